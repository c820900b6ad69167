package vnet

// Caretaking reports whether the caretaker waits for interrupts.
func (l *Link) Caretaking() bool { return l.caretaking.Load() }
