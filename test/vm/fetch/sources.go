package fetch

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// source is one archive of apt's configuration (sources.list(5)), binary
// packages only.
type source struct {
	uri, suite string
	components []string
	signedBy   string // a file name, or ""
}

// parseList reads the one-line format: deb [options] uri suite component...
func parseList(text string) []source {
	var out []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || strings.TrimLeft(rest, " \t[") == rest {
			continue // deb-src, for instance
		}
		var s source
		rest = strings.TrimSpace(rest)
		if strings.HasPrefix(rest, "[") {
			var options string
			options, rest, _ = strings.Cut(rest[1:], "]")
			for _, o := range strings.Fields(options) {
				if name, value, ok := strings.Cut(o, "="); ok && strings.EqualFold(name, "signed-by") {
					s.signedBy = keyFile(value)
				}
			}
		}
		f := strings.Fields(rest)
		if len(f) < 3 {
			continue // no component: not an archive like Debian's
		}
		s.uri, s.suite, s.components = f[0], f[1], f[2:]
		out = append(out, s)
	}
	return out
}

// parseDeb822 reads the stanza format of .sources files.
func parseDeb822(text string) []source {
	var out []source
	fields := map[string]string{}
	last := ""
	flush := func() {
		f := func(name string) []string { return strings.Fields(fields[name]) }
		enabled := !slices.Contains([]string{"no", "false", "without", "off", "disable"}, strings.ToLower(fields["enabled"]))
		if enabled && slices.Contains(f("types"), "deb") {
			for _, uri := range f("uris") {
				for _, suite := range f("suites") {
					out = append(out, source{uri, suite, f("components"), keyFile(fields["signed-by"])})
				}
			}
		}
		fields, last = map[string]string{}, ""
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \t\r\n")
		switch {
		case line == "":
			flush()
		case line[0] == '#':
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				fields[last] += "\n" + strings.TrimSpace(line)
			}
		default:
			name, value, ok := strings.Cut(line, ":")
			if ok {
				last = strings.ToLower(strings.TrimSpace(name))
				fields[last] = strings.TrimSpace(value)
			}
		}
	}
	flush()
	return out
}

// keyFile returns the first file name of a Signed-By value, "" if the value
// is a key itself or a fingerprint.
func keyFile(value string) string {
	first, _, _ := strings.Cut(value, ",")
	first = strings.TrimSpace(first)
	if !filepath.IsAbs(first) || strings.Contains(first, "\n") {
		return ""
	}
	return first
}

// machineSources reads the apt configuration below dir (normally /etc/apt).
func machineSources(dir string) []source {
	read := func(name string) string {
		b, _ := os.ReadFile(name) // an unreadable file is as good as none
		return string(b)
	}
	out := parseList(read(filepath.Join(dir, "sources.list")))
	parts, _ := filepath.Glob(filepath.Join(dir, "sources.list.d", "*"))
	for _, p := range parts {
		switch filepath.Ext(p) {
		case ".list":
			out = append(out, parseList(read(p))...)
		case ".sources":
			out = append(out, parseDeb822(read(p))...)
		}
	}
	return out
}

// mirror is an archive that may serve Debian main, and the keyring to check
// it with ("" for apt's own).
type mirror struct{ uri, keyring string }

// mirrors picks from sources those that may be Debian's main archive, the
// likeliest first. Third parties use Debian's names for suites and components
// as well, so the last word has the signature of the fetched index.
func mirrors(sources []source, keyring string) []mirror {
	var likely, possible []mirror
	for _, s := range sources {
		if !slices.Contains(s.components, "main") || strings.Contains(s.suite, "security") || strings.HasPrefix(s.uri, "cdrom:") {
			continue
		}
		m := mirror{s.uri, keyring}
		if keyring == "" {
			m.keyring = s.signedBy
		}
		if slices.Contains(likely, m) || slices.Contains(possible, m) {
			continue
		}
		if strings.Contains(s.signedBy, "debian-archive") || strings.HasSuffix(strings.TrimSuffix(s.uri, "/"), "/debian") {
			likely = append(likely, m)
		} else {
			possible = append(possible, m)
		}
	}
	return append(likely, possible...)
}
