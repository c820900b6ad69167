package console_test

import (
	"os"
	"regexp"
	"testing"
)

// Each row of the table in docs/console.md names a test that exists.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/console.md")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("features_test.go")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile(`(?m)^\|.*\| (Test\w+) \|$`).FindAllSubmatch(page, -1)
	if len(rows) != 17 {
		t.Errorf("%d rows", len(rows))
	}
	for _, r := range rows {
		if !regexp.MustCompile(`(?m)^func ` + string(r[1]) + `\(t \*testing\.T\)`).Match(tests) {
			t.Errorf("%s does not exist", r[1])
		}
	}
}
