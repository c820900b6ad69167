package regs_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The test in this file holds the promise that a register is touched by plain
// 32-bit moves only. It has two halves:
//
//   - Nothing but load32 and store32 can touch the mapping. Window keeps its
//     address in an unexported field of an integer type. Go code cannot
//     dereference an integer without package unsafe, which this package must
//     not import (nor reflect or a linkname, which would open the field to
//     others); so no compiler, however it inlines, merges or folds, can turn
//     anything into an access. That leaves assembly: the package's .s files
//     may define these two functions and no others.
//   - The two functions, in the commands as they are shipped, consist of
//     known instructions: each line of the disassembly has to be on a list of
//     what is allowed, and exactly one of them is the access.

// rules is what an access function may consist of, in Go's assembler syntax
// as objdump prints it.
type rules struct {
	frame   *regexp.Regexp // arguments and result on the stack
	barrier *regexp.Regexp
	load    *regexp.Regexp
	store   *regexp.Regexp
}

var accessRules = map[string]rules{
	"amd64": {
		frame:   regexp.MustCompile(`^(MOVQ|MOVL) 0x[0-9a-f]+\(SP\), [A-Z][A-Z0-9]+$|^MOVL [A-Z][A-Z0-9]+, 0x[0-9a-f]+\(SP\)$`),
		barrier: regexp.MustCompile(`^[SM]FENCE$`),
		load:    regexp.MustCompile(`^MOVL 0\([ABCD]X\), [ABCD]X$|^MOVL 0\([SD]I\), [ABCD]X$`),
		store:   regexp.MustCompile(`^MOVL [ABCD]X, 0\([ABCD]X\)$|^MOVL [ABCD]X, 0\([SD]I\)$`),
	},
	"arm64": {
		frame:   regexp.MustCompile(`^(MOVD|MOVWU) \d+\(RSP\), R\d+$|^MOVW R\d+, \d+\(RSP\)$`),
		barrier: regexp.MustCompile(`^DMB \$\d+$`),
		load:    regexp.MustCompile(`^MOVWU \(R\d+\), R\d+$`),
		store:   regexp.MustCompile(`^MOVW R\d+, \(R\d+\)$`),
	},
}

// checkAccess checks the instructions of load32 (load) or store32. The store
// has a barrier before the access; the load has one behind it on arm64, where
// later loads may overtake it.
func checkAccess(arch string, load bool, instructions []string) error {
	r := accessRules[arch]
	access, fence := r.store, 0
	if load {
		access = r.load
	}
	accesses := 0
	for _, i := range instructions {
		switch {
		case i == "RET":
			if accesses != 1 {
				return fmt.Errorf("%d accesses, expected 1", accesses)
			}
			if fence == 0 && (!load || arch == "arm64") {
				return fmt.Errorf("no barrier in its place")
			}
			return nil
		case access.MatchString(i):
			accesses++
		case r.barrier.MatchString(i):
			if load == (accesses == 1) {
				fence++
			}
		case !r.frame.MatchString(i):
			return fmt.Errorf("%q is not allowed", i)
		}
	}
	return fmt.Errorf("no end")
}

// disassemble returns the instructions of the functions of this package that
// load32 and store32 were compiled to, by name.
func disassemble(t *testing.T, binary string) map[string][]string {
	t.Helper()
	out, err := exec.Command("go", "tool", "objdump", "-s", `/regs\.(load32|store32)`, binary).Output()
	if err != nil {
		t.Fatalf("objdump %s: %v", binary, err)
	}
	functions := map[string][]string{}
	var name string
	for line := range strings.Lines(string(out)) {
		if text, ok := strings.CutPrefix(line, "TEXT "); ok {
			name, _, _ = strings.Cut(text, "(SB)")
			name = name[strings.LastIndex(name, "/")+1:]
			functions[name] = nil
			continue
		}
		// Columns, each followed by at least one tab: source line, address,
		// machine code, instruction.
		if f := strings.FieldsFunc(line, func(r rune) bool { return r == '\t' || r == '\n' }); len(f) == 4 {
			functions[name] = append(functions[name], f[3])
		}
	}
	return functions
}

func TestAccessInstructions(t *testing.T) {
	for arch := range accessRules {
		t.Run(arch, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			build := exec.Command("go", "build", "-trimpath", "-o", dir+"/", "../cmd/...")
			build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("go build: %v\n%s", err, out)
			}
			commands, err := filepath.Glob(dir + "/*")
			if err != nil || len(commands) == 0 {
				t.Fatalf("no commands built: %v", err)
			}
			for _, c := range commands {
				f := disassemble(t, c)
				if len(f) != 2 {
					t.Errorf("%s: expected load32 and store32, found %d functions: %v", filepath.Base(c), len(f), f)
				}
				for name, instructions := range f {
					load := strings.HasPrefix(name, "regs.load32")
					if err := checkAccess(arch, load, instructions); err != nil {
						t.Errorf("%s: %s: %v\n%s", filepath.Base(c), name, err, strings.Join(instructions, "\n"))
					}
				}
			}
		})
	}
}

// Each line is put in the place of the access, and beside it.
func TestAccessInstructionsRefused(t *testing.T) {
	good := map[string]struct{ load, store []string }{
		"amd64": {
			load:  []string{"MOVQ 0x8(SP), DI", "MOVL 0(DI), AX", "MOVL AX, 0x10(SP)", "RET", "INT $0x3"},
			store: []string{"MOVQ 0x8(SP), DI", "MOVL 0x10(SP), AX", "SFENCE", "MOVL AX, 0(DI)", "RET"},
		},
		"arm64": {
			load:  []string{"MOVD 8(RSP), R0", "MOVWU (R0), R1", "DMB $1", "MOVW R1, 16(RSP)", "RET", "?"},
			store: []string{"MOVD 8(RSP), R0", "MOVWU 16(RSP), R1", "DMB $2", "MOVW R1, (R0)", "RET"},
		},
	}
	bad := map[string][]string{
		"amd64": {
			"XCHGL AX, 0(DI)", "XCHGL 0(DI), AX", "LOCK XADDL AX, 0(DI)", "LOCK CMPXCHGL AX, 0(DI)",
			"ADDL AX, 0(DI)", "ADDL 0(DI), AX", "CMPL 0(DI), AX", "ORL $0x1, 0(DI)", "TESTB AL, 0(DI)",
			"MOVQ AX, 0(DI)", "MOVQ 0(DI), AX", "MOVL AX, 0(DI)(R9*1)", "MOVL 0(DI)(R12*4), AX",
			"MOVB $0x1, 0(DI)", "MOVL $0x1, 0(DI)", "MOVB AL, 0(DI)", "MOVW AX, 0(DI)", "MOVL SP, 0(DI)",
			"MOVUPS X15, 0(DI)", "MOVSS X0, 0(DI)", "REP; MOVSB DS:0(SI), ES:0(DI)", "STOSL AX, ES:0(DI)",
			"MOVL AX, 0x4(DI)", "MOVBLZX 0(DI), AX", "CALL 0(DI)", "JMP 0x5cd7c0",
		},
		"arm64": {
			"LDP (R0), (R1, R2)", "STP (R1, R2), (R0)", "LDAXRW (R0), R1", "STLXRW R1, (R0), R2",
			"SWPALW R1, (R0), R2", "LDADDALW R1, (R0), R2", "CASALW R1, (R0), R2", "FMOVS F8, 16(R4)",
			"FMOVS (R0), F1", "FMOVQ F0, (R0)", "MOVW.P R1, 4(R0)", "MOVW.W R1, 4(R0)", "MOVWU.P 4(R0), R1",
			"MOVD R1, (R0)", "MOVD (R0), R1", "MOVB R1, (R0)", "MOVH R1, (R0)", "MOVW R1, (R0)(R2)",
			"MOVW R1, 4(R0)", "VST1 [V0.B16], (R0)", "CALL 4(PC)", "JMP -4(PC)",
		},
	}
	for arch, g := range good {
		for _, load := range []bool{true, false} {
			fine, at := g.store, 3
			if load {
				fine, at = g.load, 1
			}
			if err := checkAccess(arch, load, fine); err != nil {
				t.Errorf("%s, load %v: %v", arch, load, err)
			}
			for _, line := range bad[arch] {
				instead := slices.Concat(fine[:at], []string{line}, fine[at+1:])
				beside := slices.Concat(fine[:at+1], []string{line}, fine[at+1:])
				for _, i := range [][]string{instead, beside} {
					if checkAccess(arch, load, i) == nil {
						t.Errorf("%s, load %v: accepted: %s", arch, load, strings.Join(i, "; "))
					}
				}
			}
			for name, i := range map[string][]string{
				"access twice": slices.Concat(fine[:at+1], fine[at:]),
				"no access":    slices.Delete(slices.Clone(fine), at, at+1),
				"no end":       fine[:at+1],
				"nothing":      nil,
			} {
				if checkAccess(arch, load, i) == nil {
					t.Errorf("%s, load %v: accepted: %s", arch, load, name)
				}
			}
		}
		noBarrier := slices.Delete(slices.Clone(g.store), 2, 3)
		late := []string{g.store[0], g.store[1], g.store[3], g.store[2], g.store[4]}
		for _, i := range [][]string{noBarrier, late} {
			if checkAccess(arch, false, i) == nil {
				t.Errorf("%s: accepted without a barrier before the store: %s", arch, strings.Join(i, "; "))
			}
		}
	}
	if checkAccess("arm64", true, slices.Delete(slices.Clone(good["arm64"].load), 2, 3)) == nil {
		t.Error("arm64: accepted without a barrier behind the load")
	}
}

// checkSource finds what would let Go code reach through Window's address.
func checkSource(file *ast.File) (findings []string) {
	for _, i := range file.Imports {
		if p := i.Path.Value; p == `"unsafe"` || p == `"reflect"` || p == `"C"` {
			findings = append(findings, "imports "+p)
		}
	}
	for _, group := range file.Comments {
		for _, c := range group.List {
			if strings.HasPrefix(c.Text, "//go:linkname") {
				findings = append(findings, c.Text)
			}
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		s, ok := n.(*ast.TypeSpec)
		if !ok || s.Name.Name != "Window" {
			return true
		}
		for _, f := range s.Type.(*ast.StructType).Fields.List {
			for _, name := range f.Names {
				if typ, _ := f.Type.(*ast.Ident); name.Name == "base" && (typ == nil || typ.Name != "uintptr") {
					findings = append(findings, "Window.base is no uintptr")
				}
				if name.IsExported() {
					findings = append(findings, "Window."+name.Name+" is exported")
				}
				if _, pointer := f.Type.(*ast.StarExpr); pointer {
					findings = append(findings, "Window."+name.Name+" is a pointer")
				}
				if _, slice := f.Type.(*ast.ArrayType); slice {
					findings = append(findings, "Window."+name.Name+" is a slice")
				}
			}
		}
		return true
	})
	return findings
}

func TestOnlyAssemblyTouchesTheMapping(t *testing.T) {
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	windows := 0
	for _, name := range sources {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range checkSource(file) {
			t.Errorf("%s: %s", name, f)
		}
		if file.Scope.Lookup("Window") != nil {
			windows++
		}
	}
	if windows != 1 {
		t.Errorf("type Window found in %d files", windows)
	}
	assembly, err := filepath.Glob("*.s")
	if err != nil || len(assembly) != len(accessRules) {
		t.Fatalf("assembly files %v, %v, expected one for each of %d architectures", assembly, err, len(accessRules))
	}
	text := regexp.MustCompile(`(?m)^\s*TEXT\s+(\S+)\(SB\)`)
	for _, name := range assembly {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var functions []string
		for _, m := range text.FindAllStringSubmatch(string(b), -1) {
			functions = append(functions, m[1])
		}
		if !slices.Equal(functions, []string{"·load32", "·store32"}) {
			t.Errorf("%s defines %v, expected load32 and store32", name, functions)
		}
	}
}

func TestSourceRefused(t *testing.T) {
	for src, want := range map[string]int{
		"package p; type Window struct { mu int; base uintptr; size int }":     0,
		"package p; import \"unsafe\"":                                         1,
		"package p; import \"reflect\"":                                        1,
		"package p\n//go:linkname load32 other.load32\nfunc load32()":          1,
		"package p; type Window struct { base []byte }":                        2,
		"package p; type Window struct { base *uint32 }":                       2,
		"package p; type Window struct { Base uintptr }":                       1,
		"package p; type Window struct { base uintptr; mem []byte; p *int32 }": 2,
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "p.go", src, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		if got := checkSource(file); len(got) != want {
			t.Errorf("%s: %d findings %v, want %d", src, len(got), got, want)
		}
	}
}
