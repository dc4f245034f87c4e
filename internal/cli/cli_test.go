// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
)

func TestRunPrintsAndExits(t *testing.T) {
	refused := fault.New(fault.Untrusted, "key", "load module klatch_7: key not trusted").WithHint("enroll the key")
	for _, tt := range []struct {
		name   string
		args   []string
		err    error
		status int
		stderr string
	}{
		{"nothing wrong", nil, nil, 0, ""},
		{"an error with a hint", nil, cli.Cannot(refused, "load livepatch %d", 7), 3, "klatch: cannot load livepatch 7: load module klatch_7: key not trusted\nhint: enroll the key\n"},
		{"an error nobody put into words", nil, errors.New("boom"), 1, "klatch: cannot run klatch load: boom\n"},
		{"a status that says all", nil, cli.ExitWith(4), 4, ""},
		{"a text of somebody hostile", nil, errors.New("server: \x1b]0;x\abad\r\nwor\u202ese"), 1, "klatch: cannot run klatch load: server:  ]0;x bad \nwor se\n"},
		{"an unknown flag", []string{"--nope"}, nil, 2, "klatch: unknown flag: --nope\nhint: see: klatch load --help\n"},
		{"too many arguments", []string{"a", "b"}, nil, 2, "klatch: accepts at most 1 arg(s), received 2\nhint: see: klatch load --help\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := &cobra.Command{Use: "klatch"}
			root.AddCommand(&cobra.Command{Use: "load", Args: cobra.MaximumNArgs(1), RunE: func(*cobra.Command, []string) error { return tt.err }})
			var stderr strings.Builder
			root.SetErr(&stderr)
			root.SetArgs(append([]string{"load"}, tt.args...))
			if got := cli.RunContext(t.Context(), root); got != tt.status {
				t.Errorf("exit status %d, want %d", got, tt.status)
			}
			if stderr.String() != tt.stderr {
				t.Errorf("stderr %q, want %q", stderr.String(), tt.stderr)
			}
		})
	}
}

func TestWriteJSONPutsTheVersionFirst(t *testing.T) {
	var b strings.Builder
	if err := cli.WriteJSON(&b, 1, struct {
		A int `json:"a"`
	}{5}); err != nil {
		t.Fatal(err)
	}
	if want := "{\n  \"version\": 1,\n  \"a\": 5\n}\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
	if err := cli.WriteJSON(&b, 1, []int{1}); err == nil {
		t.Error("a list was taken for an object")
	}
}
