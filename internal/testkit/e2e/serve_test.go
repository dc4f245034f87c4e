// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"os"
)

// serveFolder and serveAddress make this program a web server over a folder:
// the publisher's machine, in its own network namespace.
const (
	serveFolder  = "KLATCH_E2E_SERVE"
	serveAddress = "KLATCH_E2E_SERVE_ON"
)

func serveFiles(dir string) int {
	l, err := net.Listen("tcp", os.Getenv(serveAddress))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("ready")
	fmt.Fprintln(os.Stderr, http.Serve(l, http.FileServer(http.Dir(dir))))
	return 1
}
