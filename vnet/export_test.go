package vnet

// Caretaking reports whether the caretaker waits for interrupts.
func (l *Link) Caretaking() bool { return l.caretaking.Load() }

// ViolatedBefore is a violation that was found before the last reset, and told
// after it.
func (l *Link) ViolatedBefore() {
	l.rx.mu.Lock()
	session := l.rx.session - 1
	l.rx.mu.Unlock()
	l.violated(&ViolationError{Field: fieldUsedID}, session)
}
