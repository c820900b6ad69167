package ports

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestFile(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"org.example.log", "org.example.log"},
		{"com.redhat.rhevm.vdsm", "com.redhat.rhevm.vdsm"},
		{"", "port-7"},
		{"port-7", "%70ort-7"}, // a name is not the lack of one
		{"port-7x", "port-7x"},
		{".", "%2E"}, {"..", "%2E."}, {"...", "%2E.."}, {".control", "%2Econtrol"},
		{"/", "%2F"}, {"../../etc/passwd", "%2E.%2F..%2Fetc%2Fpasswd"},
		{"a b", "a%20b"}, {"a%2Fb", "a%252Fb"}, {"a#3", "a%233"}, {"a~b", "a%7Eb"},
		{"\x1b[31m\r\n", "%1B%5B31m%0D%0A"}, {"größe", "gr%C3%B6%C3%9Fe"}, {"\xff\x80", "%FF%80"}, {"-rf", "-rf"},
		{strings.Repeat("a", 60), strings.Repeat("a", 60)},
		{strings.Repeat("a", 61), strings.Repeat("a", 43) + "~" + "b0a04d7da1ae3d51"},
	} {
		got := File(c.name, 7)
		if i := strings.IndexByte(c.want, '~'); i >= 0 {
			got = got[:min(i+1, len(got))]
			c.want = c.want[:i+1]
		}
		if got != c.want {
			t.Errorf("%q: got %q, want %q", c.name, got, c.want)
		}
	}
}

// Whatever a name is, its file is one in the directory, and the name can be had
// back from it.
func TestFileIsSafe(t *testing.T) {
	files := map[string]string{}
	rapid.Check(t, func(t *rapid.T) {
		name := string(rapid.SliceOfN(rapid.SampledFrom([]byte("ab/.%~# port-1\x00\x01\n\x7f\x80\xc3\xff")), 1, 200).Draw(t, "name"))
		f := File(name, 1)
		if len(f) > maxFile || filepath.Base(f) != f || strings.HasPrefix(f, ".") || strings.ContainsFunc(f, func(r rune) bool { return r <= ' ' || r > '~' }) {
			t.Fatalf("%q: %q is not safe", name, f)
		}
		if other, ok := files[f]; ok && other != name {
			t.Fatalf("%q and %q: both %q", name, other, f)
		}
		files[f] = name
		if back, ok := Name(f); strings.Contains(f, "~") == ok || ok && back != name {
			t.Fatalf("%q: %q is %q, %t", name, f, back, ok)
		}
	})
}

func TestNameOfOtherFiles(t *testing.T) {
	for _, f := range []string{"", ".", "..", ".control", "a/b", "a b", "%", "%2", "%zz", "%2f", "%61", "a#3", "a~0123456789abcdef"} {
		if n, ok := Name(f); ok {
			t.Errorf("%q: %q", f, n)
		}
	}
}

// A character device's name is one that the kernel takes, and of its own.
func TestNodeName(t *testing.T) {
	taken := map[string]string{}
	for id, file := range []string{"org.example.log", File("../a b", 0), File("._2E._2Fa_20b", 0), File(strings.Repeat("=", 99), 0), "twin#3", "twin~3", "a=b", "a,b"} {
		n := nodeName(file, uint32(id))
		if !regexp.MustCompile(`^ivport-[A-Za-z0-9._+@:-]{1,190}$`).MatchString(n) {
			t.Errorf("%q: %q", file, n)
		}
		if taken[n] != "" {
			t.Errorf("%q and %q: both %q", file, taken[n], n)
		}
		taken[n] = file
	}
	if n := nodeName("org.example.log", 0); n != "ivport-org.example.log" {
		t.Error(n)
	}
}
