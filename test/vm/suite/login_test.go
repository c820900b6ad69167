package suite

import (
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/hinshun/vt10x"
	"golang.org/x/sys/unix"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// TestLogin has a getty on a console in a guest, and a user at a terminal of the
// host who logs in and writes a letter. The commands, and what /etc/inittab has,
// are those of docs/getty.md.
func TestLogin(t *testing.T) {
	for _, test := range []struct {
		name     string
		packages []string
		setup    string
		options  []string // of the terminal
		editor   string
	}{
		{name: "busybox", setup: busyboxSetup, editor: "vi"},
		{
			name: "agetty and PAM", packages: []string{"util-linux", "login", "vim-tiny", "ncurses-base"},
			setup: agettySetup, options: []string{"--wire", "multiport"}, editor: "vim.tiny",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := serve(t, "--protocol", "0x8003", "--vectors", "2", "--output", "0")
			// It has to be peer 0, the device.
			x := atTerminal(t, "ivshctl", append([]string{"console", "-d", s.Socket}, test.options...)...)
			x.shows(`console: \^\] leaves`)
			g := guests(t, s, vm.Config{Driver: "vfio-pci", Packages: test.packages})[0]
			run(t, g, 0, "sh", "-ec", userSetup+test.setup)
			init := start(t, g, "unshare", "-p", "-f", "busybox", "init") // it has to be process 1
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("init: %s", init.stderr.String())
				}
			})
			x.login()
			x.write(test.editor)
			x.keys("exit\r")
			x.login()
			// Who leaves without logging out is logged out.
			x.keys("\x1d")
			x.left()
			run(t, g, 0, "sh", "-c", "while ps -o user | grep anna; do sleep 0.1; done")
		})
	}
}

// userSetup makes a user with a password.
const userSetup = `
mkdir -p /home/anna
chown 1000:1000 /home/anna
echo anna:x:1000:1000:Anna:/home/anna:/bin/sh >>/etc/passwd
echo anna:x:1000: >>/etc/group
echo "anna:$(mkpasswd -m sha512 'open sesame'):20000::::::" >/etc/shadow
chmod 600 /etc/shadow`

const busyboxSetup = `
cat >/etc/inittab <<'end'
::respawn:/usr/bin/ivshctl console --pty --link /dev/ttyIVSH
::respawn:/bin/sh -c 'until [ -e /dev/ttyIVSH ]; do sleep 1; done; exec getty 0 /dev/ttyIVSH xterm'
end`

const agettySetup = `
for i in auth account session password; do
	echo "$i required pam_unix.so" >/etc/pam.d/common-$i
done
cat >/etc/inittab <<'end'
::respawn:/usr/bin/ivshctl ports serve --dir /dev/ivshmem --port console,as=pty
::respawn:/bin/sh -c 'until [ -e /dev/ivshmem/console ]; do sleep 1; done; exec /sbin/agetty ivshmem/console xterm'
end`

// terminal is a user's, with a program.
type terminal struct {
	*testing.T
	*vm.Child
	keyboard, line *os.File
	before         unix.Termios
	screen         vt10x.Terminal
	changed        chan struct{} // the screen did
}

func atTerminal(t *testing.T, name string, args ...string) *terminal {
	t.Helper()
	path, err := vm.HostBinary(deadline(t), name)
	if err != nil {
		t.Fatal(err)
	}
	x := &terminal{T: t, changed: make(chan struct{}, 1)}
	if x.keyboard, x.line, err = pty.Open(); err != nil {
		t.Fatal(err)
	}
	// It answers no questions: busybox drops what is typed right after an answer.
	x.screen = vt10x.New()
	x.resize(80, 24)
	x.before = x.modes()
	cmd := exec.Command(path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = x.line, x.line, x.line
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if x.Child, err = vm.StartChild(cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := x.keyboard.Read(b)
			x.screen.Write(b[:n])
			select {
			case x.changed <- struct{}{}:
			default:
			}
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		x.Kill()
		x.line.Close()
		x.keyboard.Close()
	})
	return x
}

// resize is what a terminal does when its window gets another size.
func (x *terminal) resize(cols, rows int) {
	x.Helper()
	x.screen.Resize(cols, rows)
	if err := pty.Setsize(x.keyboard, &pty.Winsize{Cols: uint16(cols), Rows: uint16(rows)}); err != nil {
		x.Fatal(err)
	}
}

func (x *terminal) modes() unix.Termios {
	x.Helper()
	m, err := unix.IoctlGetTermios(int(x.line.Fd()), unix.TCGETS)
	if err != nil {
		x.Fatal(err)
	}
	return *m
}

func (x *terminal) keys(s string) {
	x.Helper()
	if _, err := io.WriteString(x.keyboard, s); err != nil {
		x.Fatal(err)
	}
}

// text is what is on the screen, without the blanks at the end of lines.
func (x *terminal) text() string {
	lines := strings.Split(x.screen.String(), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

// shows waits for something on the screen.
func (x *terminal) shows(pattern string) {
	x.Helper()
	want := regexp.MustCompile(pattern)
	late := time.After(limit)
	for !want.MatchString(x.text()) {
		select {
		case <-x.changed:
		case <-late:
			x.Fatalf("there is no %s on the screen:\n%s", pattern, x.text())
		}
	}
}

// login logs in.
func (x *terminal) login() {
	x.Helper()
	x.shows(`login:\s*$`)
	x.keys("anna\r")
	x.shows(`Password:\s*$`)
	x.keys("open sesame\r")
	x.shows(`\$\s*$`)
	if x.modes() == x.before {
		x.Error("the terminal is not in raw mode")
	}
}

// write writes a letter in a full-screen editor, whose window gets larger.
func (x *terminal) write(editor string) {
	x.Helper()
	const greeting, end = "Dear host,", "yours, Anna" // not at the end of the long line: vi would scroll sideways
	long := strings.Repeat("0123456789", 9)
	x.keys("clear; " + editor + " letter\r")
	x.shows(`^\n(~\n){22}`)
	x.keys("i" + greeting + "\r" + long + "\r" + end + "\x1b")
	// The rest of the line is below it, or not to be seen. In the last row an
	// editor says what it does: no inserting any more.
	const status = `(- | )[^~]*\n$`
	x.shows(`^` + greeting + `\n` + long[:80] + `\n(` + long[80:] + `\n` + end + `|` + end + `\n~)\n(~\n){19}` + status)
	x.show("the editor")
	x.resize(100, 30)
	x.shows(`^` + greeting + `\n` + long + `\n` + end + `\n(~\n){26}` + status)
	x.show("the editor in a larger window")
	x.keys(":wq\r")
	x.shows(`\$\s*$`)
	x.keys("clear; id -un; stty size; cat letter\r")
	x.shows(`^anna\n30 100\n` + greeting + `\n` + long + `\n` + end + `\n.*\$\s*$`)
	x.show("after it")
}

// show puts the screen into the log.
func (x *terminal) show(what string) {
	x.Helper()
	cols, _ := x.screen.Size()
	edge := "+" + strings.Repeat("-", cols) + "+\n"
	var b strings.Builder
	for line := range strings.Lines(x.screen.String()) {
		b.WriteString("|" + strings.TrimSuffix(line, "\n") + "|\n")
	}
	x.Logf("%s:\n%s", what, edge+b.String()+edge)
}

// left waits for the end, and looks at the terminal.
func (x *terminal) left() {
	x.Helper()
	select {
	case <-x.Done():
	case <-time.After(limit):
		x.Fatal("it does not end")
	}
	if err := x.Kill(); err != nil {
		x.Errorf("the program: %v", err)
	}
	if x.modes() != x.before {
		x.Error("the terminal's modes are not as before")
	}
}
