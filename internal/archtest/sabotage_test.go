//go:build sabotage

package archtest

import "testing"

// FuzzSabotage fails at its seed. It shows that the campaign fuzz, which
// brings it with its option --sabotage, notices a finding.
func FuzzSabotage(f *testing.F) {
	f.Add(1)
	f.Fuzz(func(t *testing.T, n int) { t.Fatal("sabotage") })
}
