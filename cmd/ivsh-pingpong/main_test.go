package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ivshmem-go/ivshmem/link"
	"github.com/ivshmem-go/ivshmem/link/pcidev"
)

func TestMain(m *testing.M) {
	// The race detector would make each program's end take a second.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	testscript.Main(m, map[string]func(){"ivsh-pingpong": main})
}

// TestScripts runs the real program: its default, which needs nothing but
// itself, and its mistakes.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata", Setup: func(e *testscript.Env) error {
		e.Setenv("GORACE", os.Getenv("GORACE"))
		return nil
	}})
}

// TestTwoPeers plays both peers of a link that is there already. The leading
// one's sizes and counts hold for both, and nobody takes what one layer left
// behind for the next one's.
func TestTwoPeers(t *testing.T) {
	for _, over := range []string{"section,messages,conn", "conn,section,messages"} {
		t.Run(over, func(t *testing.T) { testTwoPeers(t, over) })
	}
}

func testTwoPeers(t *testing.T, over string) {
	socket := filepath.Join(t.TempDir(), "link")
	l, err := link.New(link.Config{Peers: 2, Vectors: 3, ReadWrite: 4096, Output: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	listener, err := pcidev.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- (&pcidev.Server{Link: l}).Serve(ctx, listener) }()

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out [2]bytes.Buffer
	ended := make(chan error, 2)
	for i := range 2 {
		cmd := exec.CommandContext(ctx, self, "--device", socket, "--over", over, "--mode", "interrupt",
			"--repeat", "2", "--json", "--count", "12", "--size", "64,1K", "--warmup", "3")
		cmd.Args[0] = "ivsh-pingpong"
		cmd.Stdout, cmd.Stderr = &out[i], os.Stderr
		go func() { ended <- cmd.Run() }()
	}
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	var leading, following int
	for i := range out {
		records := 0
		for d := json.NewDecoder(&out[i]); d.More(); records++ {
			var r record
			if err := d.Decode(&r); err != nil {
				t.Fatal(err)
			}
			if r.Messages < 11 || r.Errors != 0 || r.RTT == nil { // pong sees one round trip less
				t.Errorf("record %+v", r)
			}
		}
		leading, following = max(leading, records), records+following
	}
	following -= leading
	// Two rounds over a section at both, and of two layers by two sizes at one.
	if leading != 2+2*2*2 || following != 2 {
		t.Errorf("%d records by the leading peer, %d by the other; want 10 and 2", leading, following)
	}
}

// TestHDR reads what was written back by the library's own reader.
func TestHDR(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	f, err := createHDR(name, "test")
	if err != nil {
		t.Fatal(err)
	}
	h := hdrhistogram.New(1, 1e9, 3)
	for v := int64(1); v <= 1000; v++ {
		h.RecordValue(v)
	}
	for round := 1; round <= 2; round++ {
		if err := f.add(&record{Over: "unix-go", Mode: "poller", Size: 64, Round: round, Seconds: 1.5, hist: h}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.add(&record{}); err != nil { // throughput has none
		t.Error(err)
	}
	if err := f.close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	r := hdrhistogram.NewHistogramLogReader(bytes.NewReader(text))
	for _, tag := range []string{"unix-go-poller-64-round1", "unix-go-poller-64-round2"} {
		got, err := r.NextIntervalHistogram()
		if err != nil || got == nil {
			t.Fatal(got, err)
		}
		if got.Tag() != tag || got.TotalCount() != 1000 || got.ValueAtQuantile(50) != 500 {
			t.Errorf("tag %q, %d values, median %d; want %q, 1000, 500", got.Tag(), got.TotalCount(), got.ValueAtQuantile(50), tag)
		}
	}
}

// TestMedians prints three rounds of two measurements.
func TestMedians(t *testing.T) {
	var out strings.Builder
	r := &report{out: &out, measure: "latency", compare: true, rounds: 3}
	for round := range 3 {
		for over, p50 := range map[string]int64{"section": []int64{300, 100, 200}[round], "line": []int64{100, 100, 50}[round]} {
			rec := &record{Over: over, Mode: "poll", Size: 8, Messages: 10, PerSecond: 1000, RTT: &rtt{Min: 1, P50: p50, P90: 9, P99: 99, P999: 999, Max: 12345}}
			if err := r.add(rec, round); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	want := "section    poll             8         30       1ns     200ns       9ns      99ns     999ns    12.3us        1000  100ns - 300ns        3.00 (1.00 - 4.00)\n"
	if !strings.Contains(out.String(), want) {
		t.Errorf("the table lacks %q:\n%s", want, out.String())
	}
}
