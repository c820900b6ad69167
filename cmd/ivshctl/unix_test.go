package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
)

// unixEcho answers on Unix sockets with the last part of the path and what it read:
// `unix-echo PATH…`.
func unixEcho() {
	for _, path := range os.Args[1:] {
		l, err := net.Listen("unix", path)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				b, _ := io.ReadAll(c)
				fmt.Fprintf(c, "%s: %s", filepath.Base(path), b)
				c.Close()
			}
		}()
	}
	select {}
}

// unixTalk says something, and prints the answer: `unix-talk PATH WORDS`.
func unixTalk() {
	c, err := net.Dial("unix", os.Args[1])
	if err == nil {
		io.WriteString(c, os.Args[2])
		c.(*net.UnixConn).CloseWrite()
		_, err = io.Copy(os.Stdout, c)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
