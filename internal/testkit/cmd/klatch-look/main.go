// SPDX-License-Identifier: Apache-2.0

// Command klatch-look shows in a lab guest what the machine's own code sees of
// the running kernel, as JSON: klatch-look blockers|tracers|keys ANCHOR.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"klatch/internal/durable"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/klp"
	"klatch/internal/trust"
)

func main() {
	var seen any
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == "blockers":
		seen, err = klp.Running().Blockers()
	case len(os.Args) == 2 && os.Args[1] == "tracers":
		seen, err = klp.Running().Tracers()
	case len(os.Args) == 3 && os.Args[1] == "keys":
		seen, err = keys(os.Args[2])
	default:
		fmt.Fprintln(os.Stderr, "usage: klatch-look blockers|tracers|keys ANCHOR")
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

// keys is what klatchd says of the publisher's module keys; the small guest
// has no /etc/os-release, so that the facts are not complete.
func keys(anchor string) (bootkeys.Verdict, error) {
	b, err := durable.ReadFile(anchor, trust.MaxAnchor)
	if err != nil {
		return bootkeys.Verdict{}, err
	}
	a, err := trust.ParseAnchor(b, true)
	if err != nil {
		return bootkeys.Verdict{}, err
	}
	f, _ := facts.Machine{Root: "/"}.Facts("")
	return bootkeys.Judge(bootkeys.Kernel{Lockdown: f.Lockdown, Enforced: f.Enforced}, bootkeys.Read("/"), a.ModuleKeys), nil
}
