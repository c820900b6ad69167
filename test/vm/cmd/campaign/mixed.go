package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
	"github.com/ivshmem-go/ivshmem/test/vm/checks"
)

// mixedPeers is the peers of the campaign mixed: guests of a stock QEMU, host
// processes, and clients of the ivshmem2 socket.
var mixedPeers = []struct {
	kind  string
	count int
}{{"guest", 3}, {"host process", 3}, {"ivshmem2 client", 2}}

// mixed has peers of all kinds on one link: everybody rings everybody on every
// vector, and sees everybody's state.
func mixed(ctx context.Context, r *Report) error {
	const vectors = 3
	total := 0
	for _, p := range mixedPeers {
		r.Config[p.kind] = p.count
		total += p.count
	}
	r.Config["vectors"] = vectors
	dir, err := os.MkdirTemp("", "ivshmem-campaign-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program, err := buildGuestProgram(ctx, dir, vm.AMD64)
	if err != nil {
		return err
	}
	ivshmem2 := filepath.Join(dir, "ivshmem2.sock")
	service, err := vm.Serve(ctx, nil, "--peers", fmt.Sprint(total), "--vectors", fmt.Sprint(vectors), "--output", "0", "--ivshmem2-socket", ivshmem2, "--quiet")
	if err != nil {
		return err
	}
	defer service.Close()
	var configs []vm.Config
	for i := range mixedPeers[0].count {
		configs = append(configs, vm.Config{
			Name: fmt.Sprintf("guest%d", i), Driver: "vfio-pci",
			Devices: []vm.Device{{Socket: service.Socket}}, Files: map[string]string{"/bin/guestprog": program},
		})
	}
	r.say("booting %d guests", len(configs))
	guests, err := vm.StartAll(ctx, configs)
	if err != nil {
		return err
	}
	for _, g := range guests {
		defer g.Close()
	}
	rounds := 0
	for begin := time.Now(); rounds == 0 || time.Since(begin) < r.Duration; rounds++ {
		start := func(i int, kind string) (*checks.Process, error) {
			argv := []string{"guestprog", "mixed", "-peers", fmt.Sprint(total), "-vectors", fmt.Sprint(vectors), "-round", fmt.Sprint(rounds)}
			if r.Sabotage {
				argv = append(argv, "-limit", "10s")
				if kind == "host process" && i == 0 {
					argv = append(argv, "-mute")
				}
			}
			switch kind {
			case "guest":
				return checks.Start(checks.Guest(guests[i]), argv...)
			case "host process":
				return checks.Start(checks.Host(dir), append(argv, "-device", service.Socket)...)
			}
			return checks.Start(checks.Host(dir), append(argv, "-device", ivshmem2, "-ivshmem2")...)
		}
		table, err := mixedRound(ctx, total, vectors, start)
		r.Tables = []Table{table}
		if err != nil {
			return fmt.Errorf("round %d: %w", rounds, err)
		}
	}
	pairs := float64(total * (total - 1))
	r.atLeast("rounds", float64(rounds), 1)
	r.atLeast("pairs", pairs, 56)
	r.info("doorbells that arrived", float64(rounds)*pairs*vectors)
	r.info("states that were seen", float64(rounds)*2*pairs)
	return nil
}

// mixedRound lets all play once, and makes a table of it.
func mixedRound(ctx context.Context, total, vectors int, start func(i int, kind string) (*checks.Process, error)) (Table, error) {
	type peer struct {
		name    string
		process *checks.Process
		result  struct {
			ID     uint32
			Rung   []uint64
			States int
		}
	}
	peers := make([]peer, 0, total)
	for _, k := range mixedPeers {
		for i := range k.count {
			p, err := start(i, k.kind)
			if err != nil {
				return Table{}, err
			}
			defer p.Kill()
			peers = append(peers, peer{name: fmt.Sprintf("%s %d", k.kind, i), process: p})
		}
	}
	byID := make([]*peer, total)
	var failed error
	for i := range peers {
		p := &peers[i]
		select {
		case <-p.process.Done():
		case <-ctx.Done():
			return Table{}, ctx.Err()
		}
		if err := p.process.Result(ctx, &p.result); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", p.name, err))
			continue
		}
		byID[p.result.ID] = p
	}
	t := Table{Title: "vectors that arrived, and s: the states were seen; rows ring, columns are rung", Head: []string{"from \\ to"}}
	for to, p := range byID {
		if p == nil {
			return t, errors.Join(failed, fmt.Errorf("peer %d did not finish", to))
		}
		t.Head = append(t.Head, fmt.Sprintf("%d %s", to, p.name))
	}
	for from, p := range byID {
		row := []string{fmt.Sprintf("%d %s", from, p.name)}
		for to, target := range byID {
			if from == to {
				row = append(row, "")
				continue
			}
			var cell []string
			for v := range vectors {
				if target.result.Rung[from]>>v&1 != 0 {
					cell = append(cell, fmt.Sprint(v))
				}
			}
			if target.result.States == 2 {
				cell = append(cell, "s")
			}
			if len(cell) != vectors+1 {
				failed = errors.Join(failed, fmt.Errorf("%s to %s: arrived: %s", p.name, target.name, strings.Join(cell, " ")))
			}
			row = append(row, strings.Join(cell, " "))
		}
		t.Rows = append(t.Rows, row)
	}
	return t, failed
}
