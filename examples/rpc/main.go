// Rpc calls procedures of another peer.
//
//	rpc DEVICE serve           # the peer with ID 0
//	rpc DEVICE add 1 2         # any other
package main

import (
	"context"
	"fmt"
	"log"
	"net/rpc"
	"os"
	"strconv"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
)

const port = 7

// Sum is the service.
type Sum struct{}

// Add adds numbers.
func (Sum) Add(numbers []int, sum *int) error {
	for _, n := range numbers {
		*sum += n
	}
	return nil
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: rpc DEVICE serve | rpc DEVICE add NUMBER…")
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
		err = add(ep, os.Args[3:])
	}
	if err != nil {
		log.Print(err)
	}
}

func serve(ep *stream.Endpoint) error {
	if err := rpc.Register(Sum{}); err != nil {
		return err
	}
	l, err := ep.Listen(port)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	rpc.Accept(l)
	return nil
}

func add(ep *stream.Endpoint, args []string) error {
	var numbers []int
	for _, a := range args {
		n, err := strconv.Atoi(a)
		if err != nil {
			return err
		}
		numbers = append(numbers, n)
	}
	conn, err := ep.Dial(context.Background(), 0, port)
	if err != nil {
		return err
	}
	client := rpc.NewClient(conn)
	defer client.Close()
	var sum int
	if err := client.Call("Sum.Add", numbers, &sum); err != nil {
		return err
	}
	fmt.Println(sum)
	return nil
}
