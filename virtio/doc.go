// Package virtio is virtio over shared memory: a virtio device (the back-end,
// protocol types C000h on) or the driver of one (the front-end, 8000h on) on a
// link of two peers, as Linux's virtio_ivshmem driver speaks it.
//
// A device says what it offers and does its work while a driver is there:
//
//	b, err := virtio.NewBackEnd(dev, virtio.Device{
//		ID: 4, Queues: []int{8},
//		Run: func(ctx context.Context, s *virtio.Session) error {
//			for {
//				c, err := s.Queue(0).Next(ctx)
//				if err != nil {
//					return err
//				}
//				n, _ := c.Write(answer)
//				s.Queue(0).Push(c, n)
//			}
//		},
//	})
//	err = b.Serve(ctx)
//
// A driver takes a device into use from user space:
//
//	d, err := virtio.Open(ctx, dev, virtio.DriverConfig{ID: 4})
//	q, err := d.SetUpQueue(ctx, 0, 8)
//	err = d.Start(ctx)
//	buf, err := d.Alloc(64)
//	err = q.Add(buf, virtio.In(0, 64))
//	err = q.Kick()
//	buf, n, err := q.Next(ctx)
//
// Everything lies in the R/W section: the register block at its start, and
// behind it what the driver puts there. All addresses are byte offsets in the
// section; all values are little-endian.
//
// Neither side believes the other. What breaks the rules is a
// *[ViolationError] and ends the session, not the process: a device asks its
// driver for a reset (DEVICE_NEEDS_RESET) and serves on, a driver stops.
// Buffers are read and written by copies, which check that the session is
// still the one they belong to.
package virtio
