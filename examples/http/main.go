// Http is an HTTP server on one peer of a link, and its client on another.
//
//	http DEVICE serve               # the peer with ID 0
//	http DEVICE get http://0/hello  # any other
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: http DEVICE serve | http DEVICE get http://PEER/PATH")
	}
	dev, err := ivshmem.Open(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	defer dev.Close()
	ep, err := stream.New(dev, stream.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer ep.Close()
	if os.Args[2] == "serve" {
		err = serve(ep)
	} else {
		err = get(ep, os.Args[3])
	}
	if err != nil {
		log.Print(err)
	}
}

func serve(ep *stream.Endpoint) error {
	l, err := ep.Listen(80)
	if err != nil {
		return err
	}
	http.HandleFunc("GET /hello", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s, from peer %d\n", r.RemoteAddr, ep.Device().ID())
	})
	fmt.Println("ready")
	return http.Serve(l, nil)
}

func get(ep *stream.Endpoint, url string) error {
	client := http.Client{Transport: &http.Transport{
		// The host of the URL is the peer's ID, and the address PEER:80.
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			to, err := stream.ParseAddr(addr)
			if err != nil {
				return nil, err
			}
			return ep.Dial(ctx, to.Peer, to.Port)
		},
	}}
	r, err := client.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	_, err = io.Copy(os.Stdout, r.Body)
	return err
}
