package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// apt is a private state of apt for one suite and architecture: own sources,
// own lists, an empty list of installed packages. It needs no privileges and
// leaves the machine's state alone, but keeps the machine's settings for
// proxies and transports.
type apt struct{ dir, suite, arch string }

// maxIndexAge is how old an index may be before it is fetched again.
const maxIndexAge = 24 * time.Hour

// ErrNoMirror means that apt's configuration names no archive with Debian's
// packages, or none that answers.
var ErrNoMirror = errors.New("no usable Debian mirror in this machine's apt configuration")

// stale says whether the index has to be fetched.
func (a apt) stale() bool {
	st, err := os.Stat(filepath.Join(a.dir, "updated"))
	return err != nil || time.Since(st.ModTime()) >= maxIndexAge
}

// update fetches the index.
func (a apt) update(ctx context.Context) error {
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return err
		}
	}
	var keyring string
	for _, k := range []string{"debian-archive-keyring.pgp", "debian-archive-keyring.gpg"} {
		if p := "/usr/share/keyrings/" + k; keyring == "" && exists(p) {
			keyring = p
		}
	}
	found := mirrors(machineSources("/etc/apt"), keyring)
	if uri := os.Getenv("IVSHMEM_MIRROR"); uri != "" {
		found = []mirror{{uri, keyring}}
	}
	failures := []error{ErrNoMirror}
	for _, m := range found {
		if err := a.configure(m); err != nil {
			return err
		}
		_, err := a.get(ctx, "", "update", "-qq", "--error-on=any")
		if err == nil {
			return os.WriteFile(filepath.Join(a.dir, "updated"), nil, 0o644)
		}
		if ctx.Err() != nil || errors.Is(err, exec.ErrNotFound) {
			return err
		}
		failures = append(failures, fmt.Errorf("%s: %w", m.uri, err))
	}
	return fmt.Errorf("%w\nremedy: check the network, install debian-archive-keyring, or set IVSHMEM_MIRROR to the URI of a Debian mirror",
		errors.Join(failures...))
}

func (a apt) configure(m mirror) error {
	suites := []string{a.suite}
	if a.suite == Trixie {
		suites = append(suites, a.suite+"-backports")
	}
	options := "target=Packages"
	if m.keyring != "" {
		options += " signed-by=" + m.keyring
	}
	var list strings.Builder
	for _, s := range suites {
		fmt.Fprintf(&list, "deb [%s] %s %s main\n", options, m.uri, s)
	}
	// The hooks of the machine's configuration are meant for its own state.
	conf := fmt.Sprintf(`#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
#clear APT::Architectures;
APT::Architecture "%[2]s";
APT::Architectures { "%[2]s"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "%[1]s";
Dir::State::lists "%[1]s/lists";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
`, a.dir, a.arch)
	for name, text := range map[string]string{"sources.list": list.String(), "apt.conf": conf, "status": ""} {
		if err := os.WriteFile(filepath.Join(a.dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// get runs apt-get in dir and returns its output.
func (a apt) get(ctx context.Context, dir string, args ...string) (string, error) {
	return run(ctx, dir, "apt-get", append([]string{"-c", filepath.Join(a.dir, "apt.conf")}, args...)...)
}

// install lines of a simulation: Inst NAME (VERSION ...
var instLine = regexp.MustCompile(`(?m)^Inst (\S+) .*?\((\S+) `)

type pkg struct{ name, version string }

// closure returns packages with everything they depend on.
func (a apt) closure(ctx context.Context, release string, packages []string) ([]pkg, error) {
	out, err := a.get(ctx, "", append([]string{"-s", "install", "--no-install-recommends", "-t", release}, packages...)...)
	if err != nil {
		return nil, err
	}
	var all []pkg
	for _, m := range instLine.FindAllStringSubmatch(out, -1) {
		name, _, _ := strings.Cut(m[1], ":")
		all = append(all, pkg{name, m[2]})
	}
	return all, nil
}

// run runs a program in the C locale; its error carries what it printed.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	// It ends with us. The signal is tied to the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return "", fmt.Errorf("%s not found: kernels and packages for guests can be unpacked only where apt is, as on Debian and Ubuntu: %w", name, err)
	case err != nil:
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
