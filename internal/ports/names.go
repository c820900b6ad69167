package ports

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// The names of ports come from the other side, and may be anything. A file's
// name is made of a port's name so that it is safe, always the same, and can be
// turned back:
//
//   - Letters and digits of ASCII and any of "+-._@:=," stay. Every other byte is
//     %XX, and so is a dot in front, which would hide the file, and the p of a
//     name that looks like that of a port without one.
//   - A port without a name is port-N, N being its number.
//   - Of several ports with a name all but the one that came first have "#N"
//     behind it.
//   - Of a name that gets longer than 60 bytes the first 43 stay, and behind a
//     "~" there are 16 digits of its SHA-256. This is the one form that cannot
//     be turned back: a list says which port it is.

const (
	maxFile  = 60               // bytes of a file's name
	cutFile  = maxFile - 1 - 16 // that stay of a longer one
	maxExtra = 4                // "#127"
)

var (
	nameless = regexp.MustCompile(`^port-[0-9]+$`)
	escape   = regexp.MustCompile(`%..`)
)

func plain(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("+-._@:=,", c) >= 0
}

// File is the name of the file for a port with a name, and a number for one
// that has none.
func File(name string, id uint32) string {
	if name == "" {
		return fmt.Sprintf("port-%d", id)
	}
	var b strings.Builder
	for i := range len(name) {
		switch c := name[i]; {
		case plain(c) && !(i == 0 && (c == '.' || c == 'p' && nameless.MatchString(name))):
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	s := b.String()
	if len(s) <= maxFile {
		return s
	}
	end := cutFile
	if i := strings.LastIndexByte(s[:end], '%'); i > end-3 {
		end = i // not in the middle of one
	}
	sum := sha256.Sum256([]byte(name))
	return s[:end] + "~" + hex.EncodeToString(sum[:8])
}

// Name is the port's name that File made a file's name of. It fails for what
// File does not make, and for those that cannot be turned back.
func Name(file string) (string, bool) {
	if nameless.MatchString(file) {
		return "", true
	}
	bad := false
	name := escape.ReplaceAllStringFunc(file, func(s string) string {
		c, err := strconv.ParseUint(s[1:], 16, 8)
		bad = bad || err != nil
		return string([]byte{byte(c)})
	})
	if bad || name == "" || File(name, 0) != file {
		return "", false
	}
	return name, true
}
