package virtio

// Features is a set of feature bits (virtio specification, "Feature Bits"):
// bits 0 to 23 and 50 on are the device type's own.
type Features uint64

// Features of rings and transport.
const (
	// IndirectDesc lets a descriptor refer to a table of descriptors.
	IndirectDesc Features = 1 << 28
	// EventIdx lets each side say at which index it wants to be told.
	EventIdx Features = 1 << 29
	// Version1 says that the device follows virtio 1.0 or later.
	Version1 Features = 1 << 32
	// AccessPlatform says that addresses are what the platform says: here
	// offsets in the R/W section. Without it Linux would use guest-physical
	// addresses, which the back-end cannot reach.
	AccessPlatform Features = 1 << 33
	// RingPacked is the packed ring format, which is never negotiated here.
	RingPacked Features = 1 << 34
	// OrderPlatform makes Linux order its accesses by real barriers.
	OrderPlatform Features = 1 << 36
)

const (
	// required is what both sides have to accept.
	required = Version1 | AccessPlatform
	// transport is the features that this package negotiates by itself.
	transport = required | OrderPlatform | IndirectDesc | EventIdx
	// ofDevice is the bits that are the device type's own.
	ofDevice = Features(1<<24-1) | ^Features(1<<50-1)
)

// Has reports whether all features of g are in f.
func (f Features) Has(g Features) bool { return f&g == g }

// word is the 32 bits of a selector.
func (f Features) word(selector uint32) uint32 {
	switch selector {
	case 0:
		return uint32(f)
	case 1:
		return uint32(f >> 32)
	}
	return 0
}
