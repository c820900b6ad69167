package virtio

import (
	"fmt"
	"slices"
)

// initialise makes the register block what it is at the start. The caller holds
// mu.
func (b *BackEnd) initialise() {
	b.mem.zero(0, b.size)
	b.mem.WriteAt(b.config, regConfig)
	b.mem.Store32(regConfigGeneration, b.generation)
	b.mem.Store32(regSize, uint32(b.size))
	b.reset()
	b.mem.Store32(regRevision, revision) // a driver looks at it first
}

// reset makes the device what it is at the start. The caller holds mu.
func (b *BackEnd) reset() {
	b.retire(ErrReset)
	b.status, b.accepted = 0, 0
	b.selDevice, b.selDriver, b.selQueue = 0, 0, 0
	b.queues = make([]*Queue, len(b.device.Queues))
	for i := range b.queues {
		b.queues[i] = newQueue(b, i)
	}
	for _, r := range []uint64{regDeviceFeaturesSel, regDriverFeatures, regDriverFeaturesSel, regQueueSel, regDeviceStatus} {
		b.mem.Store32(r, 0)
	}
	b.mem.Store32(regDeviceFeatures, b.features.word(0))
	b.mem.Store8(regConfigEvent, 0)
	b.mem.Store8(regQueueEvent, 0)
	b.showQueue()
}

// written does what a write of the driver to a register means. The caller holds
// mu, and answers.
func (b *BackEnd) written(at uint32) {
	switch {
	case at == regDeviceFeaturesSel:
		b.selDevice = b.mem.load32(regDeviceFeaturesSel)
		b.mem.Store32(regDeviceFeatures, b.features.word(b.selDevice))
	case at == regDriverFeatures && b.status&StatusFeaturesOK == 0:
		v := Features(b.mem.load32(regDriverFeatures))
		switch b.selDriver {
		case 0:
			b.accepted = b.accepted&^(1<<32-1) | v
		case 1:
			b.accepted = b.accepted&(1<<32-1) | v<<32
		}
	case at == regDriverFeaturesSel:
		b.selDriver = b.mem.load32(regDriverFeaturesSel)
	case at == regQueueSel:
		b.selQueue = b.mem.load32(regQueueSel)
		b.showQueue()
	case at >= regQueueSize && at < regQueueEnd:
		b.queueWritten(at)
	case at == regDeviceStatus:
		b.statusWritten(Status(b.mem.load32(regDeviceStatus)))
	case at >= regConfig && uint64(at) < b.size:
		b.configWritten(uint64(at - regConfig))
	}
}

// showQueue brings a queue's registers into the block; size 0 says that there is
// no such queue. The caller holds mu.
func (b *BackEnd) showQueue() {
	var r queueRegisters
	if uint64(b.selQueue) < uint64(len(b.queues)) {
		r = b.queues[b.selQueue].registers
	}
	b.mem.Store16(regQueueSize, r.size)
	b.mem.Store16(regQueueDeviceVector, r.deviceVector)
	b.mem.Store16(regQueueDriverVector, r.driverVector)
	b.mem.Store16(regQueueEnable, r.enable)
	b.mem.Store64(regQueueDesc, r.desc)
	b.mem.Store64(regQueueDriver, r.driver)
	b.mem.Store64(regQueueDevice, r.device)
}

// queueWritten takes a write to a register of the selected queue. The caller
// holds mu.
func (b *BackEnd) queueWritten(at uint32) {
	if uint64(b.selQueue) >= uint64(len(b.queues)) {
		return
	}
	q := b.queues[b.selQueue]
	r := &q.registers
	if at != regQueueEnable {
		if r.enable == 0 {
			r.size = b.mem.load16(regQueueSize)
			r.driverVector = b.mem.load16(regQueueDriverVector)
			r.desc = b.mem.load64(regQueueDesc)
			r.driver = b.mem.load64(regQueueDriver)
			r.device = b.mem.load64(regQueueDevice)
		}
		return
	}
	switch enable := b.mem.load16(regQueueEnable); {
	case enable == 0:
		// Linux stores 32 bits here, so also the low half of the address. Who
		// enables the queue again says everything again. A session is over then,
		// and only a reset begins another.
		if r.enable != 0 {
			if b.session != nil {
				b.retire(ErrReset)
				b.todo = true
			}
			q.kill()
			b.queues[b.selQueue] = newQueue(b, q.index)
		}
	case r.enable == 0:
		if err := q.enable(); err != nil {
			b.needsReset(err)
			return
		}
		r.enable = 1
	}
}

// statusWritten takes a device status. The caller holds mu.
func (b *BackEnd) statusWritten(s Status) {
	if s == 0 {
		b.stats.Resets++
		b.reset()
		b.todo = true
		return
	}
	s |= b.status & StatusNeedsReset
	if s&StatusFeaturesOK != 0 && b.status&StatusFeaturesOK == 0 && (!b.accepted.Has(required) || !b.features.Has(b.accepted)) {
		// The driver may well read back what it wrote itself, and not see this.
		s &^= StatusFeaturesOK
	}
	if b.mem.load32(regDeviceStatus) != uint32(s) {
		b.mem.Store32(regDeviceStatus, uint32(s))
	}
	b.status = s
	switch {
	case s&(StatusFailed|StatusNeedsReset) != 0 || s&StatusDriverOK == 0:
		if b.session != nil {
			b.retire(ErrReset)
			b.todo = true
		}
	case b.session != nil:
	case s&StatusFeaturesOK == 0:
		b.needsReset(&ViolationError{-1, "driver_features", uint64(b.accepted),
			fmt.Sprintf("features that were offered (%#x), and all of %#x", uint64(b.features), uint64(required))})
	default:
		b.session = &Session{features: b.accepted, queues: slices.Clone(b.queues)}
		b.todo = true
	}
}

// needsReset ends the session, and asks the driver for a reset. The caller holds
// mu.
func (b *BackEnd) needsReset(v *ViolationError) {
	b.stats.Violations++
	b.stats.LastViolation = v.Error()
	b.retire(v)
	b.todo = true
	ok, old := b.status&StatusDriverOK != 0, b.status
	b.status |= StatusNeedsReset
	// A driver that has stored another status is about to announce it, and it may
	// be 0: what is stored then must not become this one.
	if b.mem.load32(regDeviceStatus) == uint32(old) {
		b.mem.Store32(regDeviceStatus, uint32(b.status))
	}
	if ok {
		b.configEvent()
	}
}

// configEvent tells the driver to look at status and configuration space. The
// caller holds mu. A driver that cannot be rung is gone, or the device is,
// which shows elsewhere.
func (b *BackEnd) configEvent() {
	b.mem.Store8(regConfigEvent, 1)
	b.dev.Ring(b.peer, 0)
}

// configWritten takes a write to the configuration space, which goes back to
// what it was. The caller holds mu.
func (b *BackEnd) configWritten(at uint64) {
	var value [8]byte
	n := min(uint64(len(value)), b.size-regConfig-at)
	b.mem.ReadAt(value[:n], int64(regConfig+at))
	b.mem.WriteAt(b.config[at:at+n], int64(regConfig+at))
	if b.device.ConfigWritten != nil {
		b.device.ConfigWritten(int(at), value[:n])
	}
}

// SetConfig changes the configuration space from a byte on, and tells the driver
// if there is a session.
func (b *BackEnd) SetConfig(offset int, p []byte) error {
	if n := len(b.device.Config); offset < 0 || offset > n || len(p) > n-offset {
		return fmt.Errorf("configuration space of %d bytes: expected a change inside, found %d bytes at %d", n, len(p), offset)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	copy(b.config[offset:], p)
	if !b.live {
		return nil
	}
	// A driver that reads meanwhile sees the odd generation, or another one.
	b.mem.Store32(regConfigGeneration, b.generation+1)
	b.mem.WriteAt(p, regConfig+int64(offset))
	b.generation += 2
	b.mem.Store32(regConfigGeneration, b.generation)
	if b.session != nil {
		b.configEvent()
	}
	return nil
}

// Stats is what a back-end counted.
type Stats struct {
	Transactions  uint64 `json:"transactions"` // writes of registers
	Resets        uint64 `json:"resets"`       // by the driver
	Sessions      uint64 `json:"sessions"`
	Violations    uint64 `json:"violations"`
	LastViolation string `json:"last_violation,omitempty"` // text of the last [ViolationError]
}

// Stats returns what was counted.
func (b *BackEnd) Stats() Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stats
}
