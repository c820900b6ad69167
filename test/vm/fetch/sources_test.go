package fetch

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestParseList(t *testing.T) {
	got := parseList(`# a comment
deb http://mirror.example/debian bookworm main contrib # and another
deb-src http://mirror.example/debian bookworm main
  deb [ arch=amd64,arm64 Signed-By=/usr/share/keyrings/k.gpg ] https://a.example/debian/ trixie main
deb	[trusted=yes]	mirror+file:/etc/apt/mirrors/debian.list	bookworm-updates	main
deb [signed-by=0123456789ABCDEF] http://b.example/debian stable main
deb http://flat.example/repo ./
deb
debian http://c.example/debian stable main
`)
	want := []source{
		{"http://mirror.example/debian", "bookworm", []string{"main", "contrib"}, ""},
		{"https://a.example/debian/", "trixie", []string{"main"}, "/usr/share/keyrings/k.gpg"},
		{"mirror+file:/etc/apt/mirrors/debian.list", "bookworm-updates", []string{"main"}, ""},
		{"http://b.example/debian", "stable", []string{"main"}, ""},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%v, want\n%v", got, want)
	}
}

func TestParseDeb822(t *testing.T) {
	got := parseDeb822("# first\n" +
		"Types: deb deb-src\n" +
		"# in between\n" +
		"URIs: http://mirror.example/debian\n http://second.example/debian\n" +
		"Suites: bookworm bookworm-updates\n" +
		"components: main non-free\n" +
		"Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n" +
		" \t\n" +
		"Types: deb-src\nURIs: http://source.example/debian\nSuites: sid\nComponents: main\n\n" +
		"Enabled: No\nTypes: deb\nURIs: http://off.example/debian\nSuites: sid\nComponents: main\n\n" +
		"Types: deb\r\nURIs: http://last.example/x\r\nSuites: trixie\r\nComponents: main\r\n" +
		"Signed-By:\r\n -----BEGIN PGP PUBLIC KEY BLOCK-----\r\n .\r\n abcd\r\n -----END PGP PUBLIC KEY BLOCK-----")
	key := "/usr/share/keyrings/debian-archive-keyring.gpg"
	components := []string{"main", "non-free"}
	want := []source{
		{"http://mirror.example/debian", "bookworm", components, key},
		{"http://mirror.example/debian", "bookworm-updates", components, key},
		{"http://second.example/debian", "bookworm", components, key},
		{"http://second.example/debian", "bookworm-updates", components, key},
		{"http://last.example/x", "trixie", []string{"main"}, ""},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%v, want\n%v", got, want)
	}
}

// TestMirrors has archives of others in front of Debian's, as on machines
// with third-party packages.
func TestMirrors(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"sources.list": "deb cdrom:[Debian 12]/ bookworm main\n" +
			"deb http://security.example/debian-security bookworm-security main\n",
		"sources.list.d/a-vendor.list": "deb https://vendor.example/apt bookworm main\n" +
			"deb https://tools.example/debian bookworm stable\n",
		"sources.list.d/b.sources": "Types: deb\nURIs: http://mirror.example/pub/debian/\nSuites: bookworm bookworm-updates\nComponents: main\n\n" +
			"Types: deb\nURIs: http://plain.example/archive\nSuites: bookworm\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
		"sources.list.d/c.list.disabled": "deb http://off.example/debian bookworm main\n",
	} {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := mirrors(machineSources(dir), "/key")
	want := []mirror{
		{"http://mirror.example/pub/debian/", "/key"},
		{"http://plain.example/archive", "/key"},
		{"https://vendor.example/apt", "/key"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := mirrors(nil, "/key"); got != nil {
		t.Errorf("got %v from no sources", got)
	}
}
