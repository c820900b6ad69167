package suite

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ivshmem-go/ivshmem/test/vm"
)

// TestProxy carries OpenSSH, PostgreSQL and HTTP. The guest has the servers and
// their clients; what they exchange goes to a process on the host and from
// there back into the guest, so each connection is two streams. Another process
// on the host takes it out of the machine, by TLS.
func TestProxy(t *testing.T) {
	s := serve(t, "--peers", "3", "--vectors", "2", "--output", "4M")
	g := guests(t, s, vm.Config{Driver: "vfio-pci", Packages: []string{"openssh-server", "openssh-client", "postgresql-17"}})[0]
	page := servers(t, g)
	hostProxy(t, s.Socket, []string{":22", "0:1022", ":5432", "0:6432"})
	proxy := start(t, g, "ivshctl", "proxy",
		"tcp:127.0.0.1:2222", "1:22", ":1022", "tcp:127.0.0.1:22",
		"unix:/run/.s.PGSQL.5432", "1:5432", ":6432", "tcp:127.0.0.1:5432",
		":80", "tcp:127.0.0.1:80")
	for range 5 {
		if l := proxy.line(); !strings.HasPrefix(l, "ready ") {
			t.Fatal(l)
		}
	}
	t.Run("OpenSSH", func(t *testing.T) {
		const ssh = "ssh -q -F none -p 2222 -i /root/key -o BatchMode=yes -o StrictHostKeyChecking=accept-new root@127.0.0.1 "
		out := run(t, g, 0, "/bin/sh", "-c", "md5sum </bin/busybox && "+ssh+"md5sum </bin/busybox")
		if l := strings.Fields(out); len(l) != 4 || l[0] != l[2] {
			t.Errorf("the sum of what was sent, and of what arrived: %q", out)
		}
		run(t, g, 3, "/bin/sh", "-c", ssh+"'exit 3'")
	})
	t.Run("PostgreSQL", func(t *testing.T) {
		const psql = "/usr/lib/postgresql/17/bin/psql -h /run -U pg -At postgres "
		const rows = "create table t as select i, md5(i::text) as m from generate_series(1, 20000) i"
		const sum = "select md5(string_agg(i || m, ',' order by i)) from t"
		run(t, g, 0, "/bin/sh", "-c", psql+"-c '"+rows+"' && "+psql+"-c 'copy t to stdout' >/tmp/t")
		before := run(t, g, 0, "/bin/sh", "-c", psql+`-c "`+sum+`"`)
		run(t, g, 0, "/bin/sh", "-c", psql+"-c 'truncate t' && "+psql+"-c 'copy t from stdin' </tmp/t")
		after := run(t, g, 0, "/bin/sh", "-c", psql+`-c "`+sum+`"`)
		if before != after || len(before) != 33 {
			t.Errorf("out %q, in again %q", before, after)
		}
		// One session sleeps in the server while others come and go.
		run(t, g, 0, "/bin/sh", "-c", psql+"-c 'select pg_sleep(1)' & for i in 1 2 3 4 5; do "+psql+"-c 'select 1' || exit 1; done; wait $!")
	})
	t.Run("HTTP and TLS", func(t *testing.T) { outside(t, s.Socket, page) })
}

// servers starts all servers in the guest, and returns what the web server
// has under /page.
func servers(t *testing.T, g *vm.Guest) []byte {
	run(t, g, 0, "/bin/sh", "-ec", `
ifconfig lo 127.0.0.1 up
echo 'sshd:x:100:65534::/run/sshd:/bin/false' >>/etc/passwd
mkdir -p /run/sshd /root/.ssh /etc/ssh /run/pg /run/www
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
ssh-keygen -q -t ed25519 -N '' -f /root/key
cp /root/key.pub /root/.ssh/authorized_keys
chmod -R go-rwx /root
/usr/sbin/sshd -f /dev/null -o ListenAddress=127.0.0.1 -o UsePAM=no
chown nobody /run/pg
B=/usr/lib/postgresql/17/bin
su -s /bin/sh nobody -c "$B/initdb -N -D /run/pg/data -U pg -A trust --no-locale -E UTF8 && $B/pg_ctl -w -D /run/pg/data -l /run/pg/log -o '-k /run/pg -h 127.0.0.1 -c jit=off -c shared_buffers=16MB' start" >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo "line $i of the page"; done >/run/www/page
httpd -p 127.0.0.1:80 -h /run/www`)
	var page bytes.Buffer
	for i := range 20000 {
		fmt.Fprintf(&page, "line %d of the page\n", i+1)
	}
	return page.Bytes()
}

// outside gets the page by HTTP over mutual TLS: 8 connections at a time.
func outside(t *testing.T, socket string, page []byte) {
	dir := t.TempDir()
	authority, stranger := newIdentity(t, nil), newIdentity(t, nil)
	proxy, us := newIdentity(t, authority), newIdentity(t, authority)
	address := hostProxy(t, socket, []string{"tcp:127.0.0.1:0", "0:80"},
		"--cert", proxy.file(t, dir, "cert"), "--key", proxy.keyFile(t, dir, "key"), "--ca", authority.file(t, dir, "ca"))
	roots := x509.NewCertPool()
	roots.AddCert(authority.cert)
	client := func(certificates ...tls.Certificate) *http.Client {
		return &http.Client{Timeout: limit, Transport: &http.Transport{
			DisableKeepAlives: true, // each its own connection
			TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: certificates},
		}}
	}
	var all sync.WaitGroup
	known := client(us.tls())
	for range 8 {
		all.Go(func() {
			r, err := known.Get("https://" + address + "/page")
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Body.Close()
			body, err := io.ReadAll(r.Body)
			if err != nil || sha256.Sum256(body) != sha256.Sum256(page) {
				t.Errorf("%d bytes, %v, want the page of %d", len(body), err, len(page))
			}
		})
	}
	all.Wait()
	for name, c := range map[string]*http.Client{"no certificate": client(), "a stranger's": client(stranger.tls())} {
		if r, err := c.Get("https://" + address + "/page"); err == nil {
			r.Body.Close()
			t.Errorf("%s: let in", name)
		}
	}
}

// hostProxy starts a proxy on the host, and returns where its last route begins
// when all are ready.
func hostProxy(t *testing.T, socket string, routes []string, options ...string) (address string) {
	t.Helper()
	ivshctl, err := vm.HostBinary(deadline(t), "ivshctl")
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	out := newLines()
	cmd := exec.Command(ivshctl, slices.Concat([]string{"proxy", "--device", socket}, options, routes)...)
	cmd.Stdout, cmd.Stderr = out, &stderr
	p, err := vm.StartChild(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("proxy on the host: %s", stderr.String())
		}
	})
	for range len(routes) / 2 {
		select {
		case l := <-out.c:
			address = strings.TrimPrefix(l, "ready ")
		case <-p.Done():
			t.Fatalf("the proxy on the host ended: %v", p.Kill())
		case <-time.After(limit):
			t.Fatal("the proxy on the host is not ready")
		}
	}
	return address
}

// identity is a certificate and its key.
type identity struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newIdentity makes one of an authority; nil: an authority.
func newIdentity(t *testing.T, authority *identity) *identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := &identity{key: key}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:        authority == nil, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, by := template, key
	if authority != nil {
		parent, by = authority.cert, authority.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
	if err != nil {
		t.Fatal(err)
	}
	if id.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return id
}

func (id *identity) tls() tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{id.cert.Raw}, PrivateKey: id.key}
}

func (id *identity) file(t *testing.T, dir, name string) string {
	t.Helper()
	return pemFile(t, dir, name, "CERTIFICATE", id.cert.Raw)
}

func (id *identity) keyFile(t *testing.T, dir, name string) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(id.key)
	if err != nil {
		t.Fatal(err)
	}
	return pemFile(t, dir, name, "PRIVATE KEY", der)
}

func pemFile(t *testing.T, dir, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
