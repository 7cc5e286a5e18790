// go: a program of your own, without anything of faasd's. http://go.faas/
// Build it here before you deploy the folder: CGO_ENABLED=0 go build -o server main.go
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "Hello from Go, %s!\n", host)
	})
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}
