package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/shmem"
)

var (
	sectionFlag = &cli.StringFlag{Name: "section", Aliases: []string{"s"}, Value: "rw",
		Usage: "`SECTION`: rw, output (the own one), or output:PEER (read-only)"}
	widthFlag = &cli.UintFlag{Name: "width", Aliases: []string{"w"},
		Usage: "access values of 8, 16, 32 or 64 `BITS`, each in one piece, little-endian"}
)

func (p *program) readCommand() *cli.Command {
	return command(2, &cli.Command{
		Name: "read", Usage: "read shared memory", ArgsUsage: "[OFFSET [LENGTH]]",
		Description: `Without --width a hex dump of LENGTH bytes (default: 64), or with --raw those
bytes as they are (default: the rest of the section). With --width one value, or
LENGTH bytes of them.

Example: ivshctl read --section output:1 --width 32 0x40`,
		Flags: []cli.Flag{deviceFlag, jsonFlag, sectionFlag, widthFlag,
			&cli.BoolFlag{Name: "raw", Usage: "print the bytes as they are"}},
		Action: p.read,
	})
}

func (p *program) writeCommand() *cli.Command {
	return command(-1, &cli.Command{
		Name: "write", Usage: "write shared memory", ArgsUsage: "OFFSET [VALUE…]",
		Description: `With values: each in one piece, --width bits wide (default: 32). Without: the
bytes of standard input.

Example: echo hello | ivshctl write --section output 0`,
		Flags:  []cli.Flag{deviceFlag, sectionFlag, widthFlag},
		Action: p.write,
	})
}

// place is where a read or write goes.
func place(c *cli.Context, d *ivshmem.Device) (*shmem.ReadOnly, *shmem.ReadWrite, error) {
	s := d.Sections()
	name, peer, foreign := strings.Cut(c.String("section"), ":")
	switch {
	case name == "rw" && !foreign:
		if s.ReadWrite == nil {
			return nil, nil, errors.New("this link has no R/W section: `ivshctl info` shows its sections")
		}
		return s.ReadWrite.ReadOnly(), s.ReadWrite, nil
	case name == "output" && !foreign:
		if s.Output == nil {
			return nil, nil, errors.New("this link has no output sections: `ivshctl info` shows its sections")
		}
		return s.Output.ReadOnly(), s.Output, nil
	case name == "output":
		id, err := parseUint("peer", peer, 32)
		if err != nil {
			return nil, nil, err
		}
		v, err := s.Input(uint32(id))
		return v, nil, err
	}
	return nil, nil, usagef("section %q: expected rw, output, or output:PEER", c.String("section"))
}

func (p *program) read(c *cli.Context) error {
	offset, length, err := readRange(c)
	if err != nil {
		return err
	}
	d, err := ivshmem.Open(c.String("device"), ivshmem.AsObserver())
	if err != nil {
		return err
	}
	defer d.Close()
	v, _, err := place(c, d)
	if err != nil {
		return err
	}
	width := uint64(c.Uint("width")) / 8
	if c.IsSet("width") {
		return p.readValues(v, offset, max(length, width), width, c.Bool("json"))
	}
	rest := v.Size() - min(offset, v.Size())
	if length == 0 && rest > 0 {
		length = rest
		if !c.Bool("raw") {
			length = min(length, 64)
		}
	}
	if length > rest || rest == 0 {
		return &shmem.BoundsError{Section: v.Name(), Offset: offset, Width: length, Size: v.Size()}
	}
	var out io.Writer = p.out
	if !c.Bool("raw") {
		dump := hex.Dumper(p.out)
		defer dump.Close()
		out = dump
	}
	_, err = io.Copy(out, io.NewSectionReader(v, int64(offset), int64(length)))
	return err
}

func readRange(c *cli.Context) (offset, length uint64, err error) {
	if c.NArg() > 0 {
		if offset, err = parseSize("offset", c.Args().First()); err != nil {
			return 0, 0, err
		}
	}
	if c.NArg() > 1 {
		if length, err = parseSize("length", c.Args().Get(1)); err != nil {
			return 0, 0, err
		}
	}
	if c.IsSet("width") {
		if err := checkWidth(c.Uint("width")); err != nil {
			return 0, 0, err
		}
	}
	return offset, length, nil
}

func checkWidth(bits uint) error {
	switch bits {
	case 8, 16, 32, 64:
		return nil
	}
	return usagef("--width %d: expected 8, 16, 32 or 64", bits)
}

func (p *program) readValues(v *shmem.ReadOnly, offset, length, width uint64, asJSON bool) error {
	values := []uint64{}
	for o := offset; o < offset+length; o += width {
		x, err := load(v, o, width)
		if err != nil {
			return err
		}
		values = append(values, x)
	}
	if asJSON {
		return p.printJSON(values)
	}
	for _, x := range values {
		fmt.Fprintf(p.out, "0x%0*x\n", int(2*width), x)
	}
	return nil
}

func load(v *shmem.ReadOnly, offset, width uint64) (uint64, error) {
	switch width {
	case 1:
		x, err := v.Load8(offset)
		return uint64(x), err
	case 2:
		x, err := v.Load16(offset)
		return uint64(x), err
	case 4:
		x, err := v.Load32(offset)
		return uint64(x), err
	}
	return v.Load64(offset)
}

func store(v *shmem.ReadWrite, offset, width, x uint64) error {
	switch width {
	case 1:
		return v.Store8(offset, uint8(x))
	case 2:
		return v.Store16(offset, uint16(x))
	case 4:
		return v.Store32(offset, uint32(x))
	}
	return v.Store64(offset, x)
}

func (p *program) write(c *cli.Context) error {
	if c.NArg() == 0 {
		return usagef("write: expected an offset")
	}
	offset, err := parseSize("offset", c.Args().First())
	if err != nil {
		return err
	}
	bits := uint(32)
	if c.IsSet("width") {
		bits = c.Uint("width")
	}
	if err := checkWidth(bits); err != nil {
		return err
	}
	var values []uint64
	for _, s := range c.Args().Tail() {
		x, err := parseUint("value", s, int(bits))
		if err != nil {
			return err
		}
		values = append(values, x)
	}
	// Writing memory needs no ownership: State stays as it is.
	d, err := ivshmem.Open(c.String("device"), ivshmem.AsObserver())
	if err != nil {
		return err
	}
	defer d.Close()
	_, v, err := place(c, d)
	if err != nil {
		return err
	}
	if v == nil {
		return fmt.Errorf("section %s: %w: it belongs to another peer and is read-only", c.String("section"), ivshmem.ErrNotSupported)
	}
	for i, x := range values {
		if err := store(v, offset+uint64(i)*uint64(bits/8), uint64(bits/8), x); err != nil {
			return err
		}
	}
	if values != nil {
		return nil
	}
	_, err = io.Copy(io.NewOffsetWriter(v, int64(offset)), p.in)
	return err
}
