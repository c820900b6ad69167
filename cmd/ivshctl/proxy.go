package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/ivshmem-go/ivshmem/stream"
)

func (p *program) proxyCommand() *cli.Command {
	return command(-1, &cli.Command{
		Name: "proxy", Usage: "carry TCP and Unix sockets over streams, and back", ArgsUsage: "FROM TO [FROM TO…]",
		Description: `Takes connections at FROM, joins each with a new one to TO, until it is
interrupted. FROM and TO are tcp:HOST:PORT, unix:PATH, or a stream's port: :PORT
to take, PEER:PORT to connect to. With --cert, --key and --ca the TCP sides speak
TLS: they show the certificate, and want one of that authority from the other
side, listening or connecting.

Example: ivshctl proxy :22 tcp:127.0.0.1:22
         ivshctl proxy tcp:127.0.0.1:2222 1:22`,
		Flags: []cli.Flag{deviceFlag,
			&cli.StringFlag{Name: "cert", Usage: "`FILE` with the certificate (PEM)"},
			&cli.StringFlag{Name: "key", Usage: "`FILE` with its key (PEM)"},
			&cli.StringFlag{Name: "ca", Usage: "`FILE` with the certificates of the authority (PEM)"}},
		Action: func(c *cli.Context) error {
			args := c.Args().Slice()
			if err := checkPairs("proxy", args); err != nil {
				return err
			}
			config, err := tlsConfig(c.String("cert"), c.String("key"), c.String("ca"))
			if err != nil {
				return err
			}
			return p.withEndpoint(c, func(ctx context.Context, ep *stream.Endpoint) error {
				x := &proxy{ep, config}
				return p.relay(ctx, "proxy", args, x.listen, x.dialer)
			})
		},
	})
}

type proxy struct {
	ep  *stream.Endpoint
	tls *tls.Config // nil: without
}

func (x *proxy) listen(s string) (net.Listener, error) {
	network, address, _ := strings.Cut(s, ":")
	switch network {
	case "":
		port, err := parseUint("port", address, 32)
		if err != nil {
			return nil, err
		}
		return x.ep.Listen(uint32(port))
	case "tcp", "unix":
		l, err := net.Listen(network, address)
		if err == nil && network == "tcp" && x.tls != nil {
			l = tls.NewListener(l, x.tls)
		}
		return l, err
	}
	return nil, usagef("proxy: FROM %q: expected tcp:HOST:PORT, unix:PATH or :PORT", s)
}

func (x *proxy) dialer(s string) (dialFunc, error) {
	network, address, _ := strings.Cut(s, ":")
	switch {
	case network == "tcp" && x.tls != nil:
		d := &tls.Dialer{Config: x.tls}
		return func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, network, address) }, nil
	case network == "tcp", network == "unix":
		return func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		}, nil
	}
	to, err := stream.ParseAddr(s)
	if err != nil {
		return nil, usagef("proxy: TO %q: expected tcp:HOST:PORT, unix:PATH or PEER:PORT", s)
	}
	return func(ctx context.Context) (net.Conn, error) {
		c, err := x.ep.Dial(ctx, to.Peer, to.Port)
		if err != nil {
			return nil, err
		}
		return c, nil
	}, nil
}

// tlsConfig is mutual TLS, nil if no file is named.
func tlsConfig(cert, key, ca string) (*tls.Config, error) {
	if cert == "" && key == "" && ca == "" {
		return nil, nil
	}
	if cert == "" || key == "" || ca == "" {
		return nil, usagef("proxy: TLS needs --cert, --key and --ca together")
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: expected certificates in PEM form, found none", ca)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair},
		RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}, nil
}
