package fault_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/ivshmem-go/ivshmem/internal/fault"
)

func TestErrors(t *testing.T) {
	cause := fmt.Errorf("%w: owned by process 7", fault.ErrBusy)
	for want, err := range map[string]error{
		"device 0000:00:04.0: open: in use: owned by process 7":                    &fault.DeviceError{Device: "0000:00:04.0", Op: "open", Err: cause},
		"device 0000:00:04.0: open: in use: owned by process 7 (end that process)": &fault.DeviceError{Device: "0000:00:04.0", Op: "open", Err: cause, Remedy: "end that process"},
		"in use: owned by process 7":                                               &fault.Reason{Err: cause},
		"in use: owned by process 7 (end that process)":                            &fault.Reason{Err: cause, Remedy: "end that process"},
	} {
		if err.Error() != want {
			t.Errorf("%q, want %q", err, want)
		}
		if !errors.Is(err, fault.ErrBusy) || errors.Is(err, fault.ErrNotFound) {
			t.Errorf("%q has lost its class", err)
		}
	}
}
