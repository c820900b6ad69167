package suite

import (
	"strings"
	"testing"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
)

// TestDoctor brings guests into the states that the doctor has to know.
func TestDoctor(t *testing.T) {
	c, err := checks.OpenClinic(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	g := vm.NewAll(t, c.Configs)
	for _, s := range checks.Setups {
		t.Run(s.Name, func(t *testing.T) {
			if _, _, err := c.Examine(deadline(t), g, s); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDoctorLooksOnly asks the doctor for what is not there, or in use.
func TestDoctorLooksOnly(t *testing.T) {
	s := serve(t)
	g := guests(t, s, vm.Config{Driver: "vfio-pci"})[0]
	doctor := func(status, name, says string, argv ...string) {
		t.Helper()
		f, exit, err := checks.Doctor(deadline(t), g, status, append([]string{"ivshctl", "doctor", "--json"}, argv...)...)
		if err != nil || exit != 1 || f.Name != name || !strings.Contains(f.Found+" "+f.Remedy, says) {
			t.Errorf("exit code %d, %+v, %v; want %s with %q", exit, f, err, name, says)
		}
	}
	doctor("fail", "enumeration", "ivshctl list", "0000:00:13.0")
	w := start(t, g, "ivshctl", "wait", "1")
	run(t, g, 0, "sh", "-c", "until ivshctl info --json | grep -q '\"command\": \"ivshctl\"'; do :; done")
	doctor("warn", "owner", "ivshctl")
	if err := w.Signal(2); err != nil {
		t.Fatal(err)
	}
	w.end(0)
}
