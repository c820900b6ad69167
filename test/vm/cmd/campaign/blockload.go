package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"

	"github.com/ivshmem-go/ivshmem/test/vm/checks"
)

// writing writes files of many sizes, flushes each, and says so; and others,
// that it does not flush. It removes old ones, and says so before.
const writing = `
cd /mnt
i=%d
while :; do
  head -c $((i * 7919 %% 120000 + 1)) /dev/urandom >unflushed
  dd if=/dev/urandom of=f$i bs=$((i * 104729 %% 60000 + 1)) count=2 conv=fsync 2>/dev/null
  sha256sum f$i
  i=$((i + 1))
  [ ! -e f$((i - 100)) ] || { echo removed f$((i - 100)); rm f$((i - 100)); }
done`

// write starts to write files.
func (d *disk) write() (err error) {
	d.writer, err = checks.Start(checks.Guest(d.guest), "sh", "-c", fmt.Sprintf(writing, d.started))
	return err
}

// progress waits for more files.
func (d *disk) progress(n int) error {
	for n > 0 {
		line, err := d.writer.Line(d.ctx)
		if err != nil {
			return err
		}
		if d.note(line) {
			n--
		}
	}
	return nil
}

// note remembers what the writer says, and reports whether it is a file.
func (d *disk) note(line string) bool {
	sum, name, _ := strings.Cut(line, " ")
	name = strings.TrimSpace(name)
	if sum == "removed" {
		delete(d.files, name)
		return false
	}
	d.files[name] = sum
	fmt.Sscanf(name, "f%d", &d.started)
	d.started++
	return true
}

// stop ends the writer, in a guest that lives, and remembers all that it said.
func (d *disk) stop() error {
	if err := d.writer.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	d.rest()
	return nil
}

// rest remembers all that a writer said that has ended, or is about to.
func (d *disk) rest() {
	for {
		line, err := d.writer.Line(d.ctx)
		if err != nil {
			break
		}
		d.note(line)
	}
	d.started += 2 // what was being written may be there in part
}

// check compares the files with what has to be there.
func (d *disk) check() (string, error) {
	out, err := d.sh("cd /mnt; sha256sum f*")
	if err != nil {
		return "", err
	}
	have := map[string]string{}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 {
			have[f[1]] = f[0]
		}
	}
	var bad []string
	for name, sum := range d.files {
		if have[name] != sum {
			bad = append(bad, fmt.Sprintf("%s: %q", name, have[name]))
		}
	}
	if len(bad) > 0 {
		return "", fmt.Errorf("of %d files that were flushed, %d are missing or others: %s", len(d.files), len(bad), strings.Join(bad, ", "))
	}
	d.flushed += len(d.files)
	return fmt.Sprintf("%d files, all right; file system clean", len(d.files)), nil
}

// fio is a mixed load that is verified.
func (d *disk) fio() []string {
	size := "2m"
	if !d.r.Quick {
		size = "8m"
	}
	return []string{"fio", "--name=mixed", "--filename=/mnt/mixed", "--size=" + size, "--rw=randrw", "--rwmixread=40", "--bs=4k",
		"--ioengine=libaio", "--iodepth=8", "--direct=1", "--fsync=64", "--fallocate=none",
		"--verify=crc32c", "--verify_fatal=1", "--unlink=1", "--output-format=json", fmt.Sprintf("--randseed=%d", d.r.rand.Uint32())}
}

// loaded waits for the load, which has to have found what it wrote.
func (d *disk) loaded(load *checks.Process) (string, error) {
	if err := load.End(d.ctx, 0); err != nil {
		return "", err
	}
	var text strings.Builder
	for {
		line, err := load.Line(d.ctx)
		if err != nil {
			break
		}
		text.WriteString(line + "\n")
	}
	_, out, _ := strings.Cut(text.String(), "{")
	type direction struct {
		Total float64 `json:"total_ios"`
		IOPS  float64 `json:"iops"`
	}
	var f struct {
		Jobs []struct {
			Error       int
			Read, Write direction
		}
	}
	if err := json.Unmarshal([]byte("{"+out), &f); err != nil || len(f.Jobs) != 1 {
		return "", fmt.Errorf("fio: %w: %s", err, text.String())
	}
	j := f.Jobs[0]
	if j.Error != 0 || j.Write.Total == 0 || j.Read.Total < j.Write.Total {
		return "", fmt.Errorf("fio: error %d, %g writes, %g reads", j.Error, j.Write.Total, j.Read.Total)
	}
	d.r.sample("fio_reads_per_s", j.Read.IOPS)
	d.r.sample("fio_writes_per_s", j.Write.IOPS)
	return fmt.Sprintf("fio: %.0f reads, %.0f writes, verified", j.Read.Total, j.Write.Total), nil
}
