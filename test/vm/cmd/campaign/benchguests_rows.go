package main

import (
	"fmt"
	"slices"
	"strings"
)

// otherDevice begins the names of what goes over another device than the link.
const otherDevice = "beside: "

var besides = [3]string{"v1", "virtio-serial", "TCP"}

var guestJobs = slices.Concat([]guestJob{
	{name: "section poll", link: "--over section --mode poll --batch 16"},
	{name: "section thread", link: "--over section --mode interrupt --warmup 100"},
	{name: "section poller", link: "--over section --mode interrupt --warmup 100 --sleep poller"},
	{name: "messages poll", link: "--over messages --mode poll --batch 16"},
	{name: "messages adaptive", link: "--over messages --mode adaptive --batch 16", times: 4},
	{name: "messages thread", link: "--over messages --mode interrupt --warmup 100"},
	{name: "conn poll", link: "--over conn --mode poll --batch 16"},
	{name: "throughput", link: "--over conn --mode adaptive --measure throughput --size 64K --warmup 100", times: 2},
	{name: "rate", link: "--over messages --mode adaptive --measure rate", times: 4},
	{name: "poll, 64 peers", link: "--over messages --mode poll --batch 16", crowd: true},
	{name: "asleep, 64 peers", link: "--over messages --mode interrupt --warmup 100", crowd: true},
	{name: "poll, 1 conn", link: "--over messages --mode poll --batch 16 --conns 1"},
	{name: "poll, 1000 conns", link: "--over messages --mode poll --batch 16 --conns 1000"},
	{name: "asleep, 1 conn", link: "--over messages --mode interrupt --warmup 100 --conns 1"},
	{name: "asleep, 1000 conns", link: "--over messages --mode interrupt --warmup 100 --conns 1000"},
}, otherJobs())

func otherJobs() (out []guestJob) {
	for _, j := range []string{
		"v1 poll 8", "v1 poll 64", "v1 thread 8", "v1 thread 64", "v1 poller 8",
		"serial thread 8", "serial thread 64", "serial poller 8",
		"tcp thread 8", "tcp thread 64", "tcp poller 8",
	} {
		f := strings.Fields(j)
		options := "-warmup 100"
		if f[1] == "poll" {
			options = "-warmup 1000 -batch 16"
		}
		out = append(out, guestJob{name: otherDevice + j, other: fmt.Sprintf("-over %s -mode %s -size %s %s", f[0], f[1], f[2], options)})
	}
	for _, j := range []string{"v1 poll", "serial thread", "tcp thread"} {
		f := strings.Fields(j)
		over := fmt.Sprintf("-over %s -mode %s -warmup 100", f[0], f[1])
		out = append(out,
			guestJob{name: otherDevice + f[0] + " throughput", other: over + " -measure throughput -size 65536", times: 2},
			guestJob{name: otherDevice + f[0] + " rate", other: over + " -measure rate -size 64"})
	}
	return out
}

// guestRow is a figure of the link, and of the other devices: the names of
// measurements, or why there is none.
type guestRow struct {
	what   string
	value  func(figures) float64
	own    string
	unit   string
	beside [3]string
}

const noMemory = "none: nothing to look at"

var guestRows = []guestRow{
	{"polled round trip, 8 bytes, section", figures.rtt, "section poll", "ns", [3]string{otherDevice + "v1 poll 8", noMemory, noMemory}},
	{"polled round trip, 64 bytes, messages", figures.rtt, "messages poll", "ns", [3]string{otherDevice + "v1 poll 64", noMemory, noMemory}},
	{"polled round trip, 64 bytes, net.Conn", figures.rtt, "conn poll", "ns", [3]string{otherDevice + "v1 poll 64", noMemory, noMemory}},
	{"sleeping round trip, 8 bytes, section, dedicated thread", figures.rtt, "section thread", "ns", [3]string{otherDevice + "v1 thread 8", otherDevice + "serial thread 8", otherDevice + "tcp thread 8"}},
	{"sleeping round trip, 8 bytes, section, Go's poller", figures.rtt, "section poller", "ns", [3]string{otherDevice + "v1 poller 8", otherDevice + "serial poller 8", otherDevice + "tcp poller 8"}},
	{sleepingRow, figures.rtt, "messages thread", "ns", [3]string{otherDevice + "v1 thread 64", otherDevice + "serial thread 64", otherDevice + "tcp thread 64"}},
	{"round trip, 64 bytes, messages, adaptive, peer busy", figures.rtt, "messages adaptive", "ns", [3]string{otherDevice + "v1 poll 64", otherDevice + "serial thread 64", otherDevice + "tcp thread 64"}},
	{"throughput, 64 KiB writes, net.Conn, adaptive", figures.throughput, "throughput", "B/s", [3]string{otherDevice + "v1 throughput", otherDevice + "serial throughput", otherDevice + "tcp throughput"}},
	{"message rate, 64 bytes, 64 at a time, adaptive", figures.rate, "rate", "/s", [3]string{otherDevice + "v1 rate", otherDevice + "serial rate", otherDevice + "tcp rate"}},
	{"CPU seconds per GB, net.Conn, adaptive", figures.cpuPerGB, "throughput", "s/GB", [3]string{otherDevice + "v1 throughput", otherDevice + "serial throughput", otherDevice + "tcp throughput"}},
}

// sleepingRow has a bar: a doorbell is a message to the service, an exit and a
// process more than a packet of virtio-net takes, but a guest's network stack is
// long, too.
const sleepingRow, sleepingBar = "sleeping round trip, 64 bytes, messages, dedicated thread", 3

// guestBars are figures of the link by itself. Only those that do not depend on
// what the machine does meanwhile are bars.
var guestBars = []bar{
	{what: "adaptive round trip, peer busy / polled", value: figures.rtt, own: "messages adaptive", against: []string{"messages poll"}},
	{what: "polled round trip, 64 peers / 2", value: figures.rtt, own: "poll, 64 peers", against: []string{"messages poll"}},
	{what: "sleeping round trip, 64 peers / 2", value: figures.rtt, own: "asleep, 64 peers", against: []string{"messages thread"}},
	{what: "polled round trip, 1000 idle connections / 1", value: figures.rtt, own: "poll, 1000 conns", against: []string{"poll, 1 conn"}},
	{what: "sleeping round trip, 1000 idle connections / 1", value: figures.rtt, own: "asleep, 1000 conns", against: []string{"asleep, 1 conn"}},
	{what: "doorbells per message, both busy", value: func(f figures) float64 { return f.Doorbells }, own: "rate", want: 0.05},
	{what: "doorbells per message of a round trip, both busy", value: func(f figures) float64 { return f.Doorbells / 2 }, own: "messages adaptive", want: 0.05},
	{what: "allocations per message", value: func(f figures) float64 { return f.Allocations }, own: "rate", want: 0.005},
	{what: "allocations per round trip", value: func(f figures) float64 { return f.Allocations }, own: "conn poll", want: 0.05},
}
