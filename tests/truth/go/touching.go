// Two functions that touch, one on the main goroutine and one on another: the first slices of Go's heap, the second
// mappings of its own.
package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"
	"syscall"
)

const (
	mib  = 1 << 20
	page = 4096
)

var held [][]byte

//go:noinline
func touchOnMain(bytes int) int {
	memory := make([]byte, bytes)
	for at := 0; at < bytes; at += page {
		memory[at] = 1
	}
	held = append(held, memory)
	if strings.HasPrefix(runtime.Version(), "go1.1") {
		// these clear two bits of their heap's bitmap for every word that is handed out
		return bytes + bytes/32
	}
	return bytes
}

//go:noinline
func touchOnAnother(bytes int) int {
	memory, err := syscall.Mmap(-1, 0, bytes, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		panic(err)
	}
	for at := 0; at < bytes; at += page {
		memory[at] = 1
	}
	if err := syscall.Munmap(memory); err != nil {
		panic(err)
	}
	return bytes
}

func main() {
	done := map[string]int{"main.touchOnMain": 0, "main.touchOnAnother": 0}
	end := make(chan int)
	go func() {
		bytes := 0
		for i := 0; bytes < 192*mib; i++ {
			bytes += touchOnAnother((300 + i*37%190) * page)
		}
		end <- bytes
	}()
	for i := 0; done["main.touchOnMain"] < 128*mib; i++ {
		done["main.touchOnMain"] += touchOnMain((300 + i*53%190) * page)
	}
	done["main.touchOnAnother"] = <-end
	line, err := json.Marshal(map[string]interface{}{"workload": "go", "touch": done})
	if err != nil {
		panic(err)
	}
	fmt.Println(string(line))
}
