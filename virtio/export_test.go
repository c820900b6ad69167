package virtio

// Guarding reports whether Serve itself waits for register writes.
func (b *BackEnd) Guarding() bool { return b.guard.serving.Load() }
