package vm

import (
	"os"
	"path/filepath"
	"testing"
)

// New boots a guest for a test and ends it with the test. If the test has
// failed, the guest's console goes into the test's artifact folder, and its
// last lines into the log.
func New(t *testing.T, c Config) *Guest {
	t.Helper()
	return NewAll(t, []Config{c})[0]
}

// NewAll does the same for several guests, which boot at the same time
// (StartAll).
func NewAll(t *testing.T, configs []Config) []*Guest {
	t.Helper()
	for i := range configs {
		if configs[i].Progress == nil {
			configs[i].Progress = func(message string) { t.Log(message) }
		}
	}
	guests, err := StartAll(t.Context(), configs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, g := range guests {
			g.Close()
			if t.Failed() {
				g.keepConsole(t)
			}
		}
	})
	return guests
}

func (g *Guest) keepConsole(t *testing.T) {
	file := filepath.Join(t.ArtifactDir(), g.Name()+"-console.log")
	if err := os.WriteFile(file, []byte(g.Console()), 0o644); err != nil {
		t.Log(err)
	}
	if tail := g.console.tail(4000); tail != "" {
		t.Logf("end of the console of %s:\n%s", g.Name(), tail)
	}
}
