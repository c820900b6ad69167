// Sensor keeps a reading in the R/W section, where all peers see the newest one
// without asking: a page with a sequence lock.
//
//	sensor DEVICE measure   # one peer: a reading for each number on standard input
//	sensor DEVICE show      # any others: each new reading, by interrupt
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/shmem"
)

// The page, in words of 8 bytes: a sequence number, which is odd while the
// reading is being written, the number of the reading, and its value.
const sequence, number, value = 0, 8, 16

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: sensor DEVICE measure | sensor DEVICE show")
	}
	dev, err := ivshmem.Open(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	if os.Args[2] == "measure" {
		err = measure(dev, dev.Sections().ReadWrite)
	} else {
		err = show(dev, dev.Sections().ReadWrite.ReadOnly())
	}
	if err != nil {
		log.Print(err)
	}
}

func measure(dev *ivshmem.Device, page *shmem.ReadWrite) error {
	n := uint64(0)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		x, err := strconv.ParseUint(in.Text(), 0, 64)
		if err != nil {
			return err
		}
		n++
		err = errors.Join(page.Store64(sequence, 2*n-1), page.Store64(number, n), page.Store64(value, x), page.Store64(sequence, 2*n))
		if err != nil {
			return err
		}
		// A new state interrupts all peers at once.
		if err := dev.SetState(uint32(n)); err != nil {
			return err
		}
	}
	return nil
}

func show(dev *ivshmem.Device, page *shmem.ReadOnly) error {
	var last, n, x uint64
	fresh := func() bool {
		before, _ := page.Load64(sequence)
		n, _ = page.Load64(number)
		x, _ = page.Load64(value)
		after, _ := page.Load64(sequence)
		return before == after && before%2 == 0 && n != last
	}
	fmt.Println("ready")
	for {
		if err := dev.Wait(context.Background(), []int{0}, fresh); err != nil {
			return err
		}
		last = n
		fmt.Println("reading", n, "is", x)
	}
}
