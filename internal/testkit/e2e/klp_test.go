// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
)

// TestVMKlpConformance: the real kernel keeps the contract that the fake one
// keeps in go test.
func TestVMKlpConformance(t *testing.T) {
	m := everything(t)
	program := filepath.Join(work, "klp.test")
	if err := goBuild(t.Context(), "test", "-c", "-tags", "vm", "-o", program, "./internal/machine/klp"); err != nil {
		t.Fatal(err)
	}
	guest, err := m.rig.Boot(t.Context(), lab.Spec{Name: "klp", Kernel: m.kernel.Tree.Image(), Files: []lab.File{
		{Name: "klp.test", Source: program, Mode: 0o755},
		{Name: "klatch_1.ko", Source: m.builds[1].Module.Path},
		{Name: "klatch_2.ko", Source: m.builds[2].Module.Path},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	res, err := guest.Run(t.Context(), lab.Command{Timeout: 3 * time.Minute, Env: []string{"KLATCH_KLP_FIXTURES=" + lab.FilesDir, "TMPDIR=/tmp"},
		Argv: []string{lab.FilesDir + "/klp.test", "-test.v", "-test.run", "^TestConformance$"}})
	if err != nil {
		t.Fatal(err)
	}
	out := string(res.Stdout) + string(res.Stderr)
	if res.Exit != 0 || !strings.Contains(out, "--- PASS: TestConformance") {
		t.Errorf("exit status %d\n%s", res.Exit, out)
	}
	console, err := guest.Console()
	if err != nil {
		t.Fatal(err)
	}
	for _, trouble := range lab.ScanConsole(console) {
		if trouble.Kind != lab.Module { // the suite offers damaged modules
			t.Errorf("the kernel complained: %+v", trouble)
		}
	}
}
