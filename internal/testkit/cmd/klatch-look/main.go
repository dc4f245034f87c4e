// SPDX-License-Identifier: Apache-2.0

// Command klatch-look shows in a lab guest what the machine's own code sees of
// the running kernel, as JSON: klatch-look blockers|tracers.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"klatch/internal/machine/klp"
)

func main() {
	var seen any
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == "blockers":
		seen, err = klp.Running().Blockers()
	case len(os.Args) == 2 && os.Args[1] == "tracers":
		seen, err = klp.Running().Tracers()
	default:
		fmt.Fprintln(os.Stderr, "usage: klatch-look blockers|tracers")
		os.Exit(2)
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(seen)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "klatch-look:", err)
		os.Exit(1)
	}
}
