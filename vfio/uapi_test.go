package vfio

import (
	"errors"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestIoctlFails: what a failed ioctl returns may be taken for a descriptor
// and closed, so it must not be 0, which is somebody's.
func TestIoctlFails(t *testing.T) {
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var name [1]byte
	fd, err := ioctl(int(f.Fd()), ioctlGroupGetDevice, unsafe.Pointer(&name))
	if !errors.Is(err, unix.ENOTTY) || fd != -1 {
		t.Errorf("got %d, %v, want -1, ENOTTY", fd, err)
	}
}
