package vm

import (
	"os/exec"
	"runtime"
	"syscall"
)

// Child is a process that does not outlive this one.
type Child struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done
}

// StartChild starts cmd in a process group of its own, or in a session of its
// own where cmd says so. The kernel kills it
// when this process ends, even by SIGKILL.
func StartChild(cmd *exec.Cmd) (*Child, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = !cmd.SysProcAttr.Setsid
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	c := &Child{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The kernel sends the signal when the thread ends that forked,
		// so this thread has to live as long as the child. It is never
		// unlocked: it ends with this goroutine.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			c.err = cmd.Wait()
			close(c.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return c, nil
}

// Pid returns the process id.
func (c *Child) Pid() int { return c.cmd.Process.Pid }

// Done is closed when the process has ended.
func (c *Child) Done() <-chan struct{} { return c.done }

// Signal sends a signal to the process. It does nothing if that has ended.
func (c *Child) Signal(s syscall.Signal) { _ = c.cmd.Process.Signal(s) }

// Kill ends the process with SIGKILL, waits until it is gone, and returns
// what exec.Cmd.Wait returned.
func (c *Child) Kill() error {
	_ = c.cmd.Process.Kill()
	<-c.done
	return c.err
}
