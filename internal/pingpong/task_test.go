package pingpong

import (
	"errors"
	"fmt"
	"net"
	"testing"
	"time"
)

// fakeChannel is one end of a Channel in memory, which may do harm to what
// arrives.
type fakeChannel struct {
	out, in chan []byte
	harm    func(n int, p []byte)
	n       int
}

func (f *fakeChannel) Send(p []byte) error {
	f.out <- append([]byte(nil), p...)
	return nil
}

func (f *fakeChannel) Receive(p []byte) error {
	m, ok := <-f.in
	if !ok {
		return errors.New("the other end is gone")
	}
	copy(p, m)
	f.n++
	if f.harm != nil {
		f.harm(f.n, p)
	}
	return nil
}

// fakeLinks are both ends of a link in memory: the leading one is the first,
// and harm is done to what arrives at the second.
func fakeLinks(harm func(n int, p []byte)) (links [2]Link, leave func() error) {
	// More than all messages of these tests, so that none blocks its sender.
	a, b := make(chan []byte, 1<<12), make(chan []byte, 1<<12)
	c, d := net.Pipe()
	links[0] = Link{Data: &fakeChannel{out: a, in: b}, Control: NewControl(c)}
	links[1] = Link{Data: &fakeChannel{out: b, in: a, harm: harm}, Control: NewControl(d)}
	return links, c.Close
}

// runTask runs a task between two goroutines.
func runTask(t *testing.T, task Task, harm func(n int, p []byte)) (res *Outcome, lead, follow error) {
	links, leave := fakeLinks(harm)
	followed := make(chan error, 1)
	go func() {
		err := FollowTask(links[1], task)
		if err != nil { // what a process that ends does by itself
			close(links[1].Data.(*fakeChannel).out)
		}
		followed <- err
	}()
	res, lead = LeadTask(links[0], task)
	leave()
	return res, lead, <-followed
}

func TestTask(t *testing.T) {
	for _, test := range []struct {
		task     Task
		messages uint64 // 0: some
		samples  int64
	}{
		{Task{Measure: Latency, Size: 8, Messages: 100, Warmup: 10}, 100, 100},
		{Task{Measure: Latency, Size: 1000, Messages: 100, Batch: 10}, 100, 10},
		{Task{Measure: Latency, Size: 64, Duration: 20 * time.Millisecond, Warmup: 10}, 0, 0},
		{Task{Measure: Latency, Size: 64, Duration: time.Hour, Messages: 20}, 20, 20},
		{Task{Measure: Throughput, Size: 64, Messages: 100, Warmup: 1}, 100, 0},
		{Task{Measure: Rate, Size: 64, Messages: 100, Warmup: 100}, 100, 0},
	} {
		t.Run(fmt.Sprintf("%s %d bytes %d", test.task.Measure, test.task.Size, test.task.Messages), func(t *testing.T) {
			arrived := 0
			res, err, ferr := runTask(t, test.task, func(int, []byte) { arrived++ })
			if err != nil || ferr != nil {
				t.Fatal(err, ferr)
			}
			if test.messages != 0 && res.Messages != test.messages || res.Messages == 0 {
				t.Errorf("%d messages, want %d", res.Messages, test.messages)
			}
			// With those before, and the one that ends the run.
			if want := int(res.Messages + test.task.Warmup + 1); arrived != want {
				t.Errorf("%d messages arrived, want %d", arrived, want)
			}
			if test.samples != 0 && res.RTT.TotalCount() != test.samples {
				t.Errorf("%d samples, want %d", res.RTT.TotalCount(), test.samples)
			}
			if test.task.Duration > 0 && test.messages == 0 && res.Elapsed < test.task.Duration {
				t.Errorf("ended after %v, want %v", res.Elapsed, test.task.Duration)
			}
		})
	}
}

// TestTaskMarks spoils a word of each cache line in turn: the receiver looks at
// all of them.
func TestTaskMarks(t *testing.T) {
	const size = 1000
	for at := 0; at+8 <= size; at += line {
		_, lead, follow := runTask(t, Task{Measure: Latency, Size: size, Messages: 10, Warmup: 1}, func(n int, p []byte) {
			if n == 5 {
				p[at+7] ^= 1
			}
		})
		var wrong *MessageError
		if !errors.As(follow, &wrong) || lead == nil {
			t.Errorf("byte %d was spoiled: got %v and %v, want a MessageError", at+7, lead, follow)
		}
	}
	// One that is stale, as it was delivered twice.
	var old []byte
	_, _, err := runTask(t, Task{Measure: Latency, Size: 64, Messages: 10}, func(n int, p []byte) {
		if n == 5 {
			copy(p, old)
		}
		old = append(old[:0], p...)
	})
	if err == nil || err.Error() != "message: sequence number: expected 0x5, found 0x4" {
		t.Errorf("a message came twice: got error %v", err)
	}
}

// TestOpenLoop stops the other end once: those messages that were due
// meanwhile are late too, which a closed loop would hide.
func TestOpenLoop(t *testing.T) {
	const stall = 100 * time.Millisecond
	task := Task{Measure: Latency, Size: 64, Messages: 200, Rate: 1000}
	late := func() int64 {
		begin := time.Now()
		res, err, ferr := runTask(t, task, func(n int, p []byte) {
			if n == 50 {
				time.Sleep(stall)
			}
		})
		if err != nil || ferr != nil {
			t.Fatal(err, ferr)
		}
		if took := time.Since(begin); task.Rate > 0 && took < 199*time.Millisecond {
			t.Errorf("200 messages at 1000 a second took %v", took)
		}
		return res.RTT.TotalCount() - countBelow(res, stall/2)
	}
	if n := late(); n < 45 {
		t.Errorf("%d messages were half as late as the other end stopped, want about 50", n)
	}
}

func countBelow(res *Outcome, limit time.Duration) (n int64) {
	for _, b := range res.RTT.Distribution() {
		if b.To < int64(limit) {
			n += b.Count
		}
	}
	return n
}

// TestTaskHostile gives a follower tasks that no leading process sends.
func TestTaskHostile(t *testing.T) {
	for _, task := range []Task{
		{Measure: Latency, Size: 7, Messages: 1},
		{Measure: Latency, Size: -1, Messages: 1},
		{Measure: Latency, Size: maxSize + 1, Messages: 1},
		{Measure: Latency, Size: 64},
	} {
		if err := FollowTask(Link{}, task); err == nil {
			t.Errorf("task %+v: got no error", task)
		}
	}
}
