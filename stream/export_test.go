package stream

// SetMaxSpinners sets how many may look at a time, and returns how many might.
func SetMaxSpinners(n int32) int32 {
	before := maxSpinners
	maxSpinners = n
	return before
}
