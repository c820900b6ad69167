// Pubsub sends each line that it reads to all peers that have subscribed.
//
//	pubsub DEVICE publish <LINES   # the peer with ID 0
//	pubsub DEVICE subscribe        # any others, any number of them
//
// A subscriber that falls behind by more than a second is dropped.
package main

import (
	"bufio"
	"context"
	"fmt"
	"log"
	"os"
	"sync"
	"time"

	"github.com/ivshmem-go/ivshmem"
	"github.com/ivshmem-go/ivshmem/stream"
)

const port = 7

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: pubsub DEVICE publish|subscribe")
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
	if os.Args[2] == "publish" {
		err = publish(ep)
	} else {
		err = subscribe(ep)
	}
	if err != nil {
		log.Print(err)
	}
}

func publish(ep *stream.Endpoint) error {
	l, err := ep.Listen(port)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	var mu sync.Mutex
	subscribers := map[*stream.Conn]bool{}
	go func() {
		for {
			c, err := l.AcceptStream()
			if err != nil {
				return
			}
			mu.Lock()
			subscribers[c] = true
			fmt.Println("subscriber", c.RemoteAddr())
			mu.Unlock()
		}
	}()
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); mu.Unlock() {
		mu.Lock()
		for c := range subscribers {
			c.SetWriteDeadline(time.Now().Add(time.Second))
			if err := c.Send(lines.Bytes()); err != nil {
				log.Print(err)
				c.Close()
				delete(subscribers, c)
			}
		}
	}
	return nil
}

func subscribe(ep *stream.Endpoint) error {
	c, err := ep.Dial(context.Background(), 0, port)
	if err != nil {
		return err
	}
	defer c.Close()
	for message := make([]byte, bufio.MaxScanTokenSize); ; {
		n, err := c.Receive(message)
		if err != nil {
			return err // io.EOF: the publisher has ended
		}
		fmt.Printf("%s\n", message[:n])
	}
}
