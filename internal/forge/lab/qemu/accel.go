// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/forge/lab"
)

// The accelerators.
const (
	accelTCG accelerator = "tcg" // plain emulation, works everywhere
	accelKVM accelerator = "kvm"
)

// probeLimit is what a kernel may take under KVM from power-on to a finished
// command; a working KVM needs about one second. Hosts exist where KVM can
// be opened and then hangs, so only a booted kernel is proof.
const probeLimit = 8 * time.Second

// probeResult is what the cache keeps.
type probeResult struct {
	Accelerator accelerator `json:"accelerator"`
	Reason      string      `json:"reason"`
	HostKernel  string      `json:"host_kernel"`
	Emulator    string      `json:"emulator"`
}

// accelerator finds out once which accelerator works on this host.
func (r *Rig) accelerator(ctx context.Context, kernel string) (accelerator, error) {
	r.probing.Lock()
	defer r.probing.Unlock()
	if r.accel != "" {
		return r.accel, nil
	}
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		r.accel = accelTCG
		return r.accel, nil
	} else if err := f.Close(); err != nil {
		return "", err
	}
	host, err := r.host(ctx)
	if err != nil {
		return "", err
	}
	if cached, ok := r.cachedProbe(host); ok {
		r.accel = cached.Accelerator
		return r.accel, nil
	}
	if err := checkSpec(lab.Spec{Kernel: kernel}); err != nil {
		return "", err // says nothing about KVM
	}
	host.Accelerator, host.Reason = accelKVM, "booted a kernel"
	if err := r.probe(ctx, kernel); err != nil {
		host.Accelerator, host.Reason = accelTCG, err.Error()
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx) // the probe was cut short
	}
	r.accel = host.Accelerator
	r.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "accelerator probed",
		slog.String("accelerator", string(host.Accelerator)), slog.String("reason", host.Reason))
	return r.accel, r.keepProbe(host)
}

// probe boots the kernel under KVM and runs one program.
func (r *Rig) probe(ctx context.Context, kernel string) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeLimit, errors.New("kvm probe took too long"))
	defer cancel()
	m, err := r.boot(ctx, lab.Spec{Name: "kvm probe", Kernel: kernel, BootTimeout: probeLimit, CPUs: 1}, accelKVM)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	res, err := m.Run(ctx, lab.Command{Argv: []string{"true"}})
	if err == nil && res.Exit != 0 {
		err = fmt.Errorf("true: exit status %d", res.Exit)
	}
	return err
}

// host names what a probe's result depends on.
func (r *Rig) host(ctx context.Context) (probeResult, error) {
	version, err := os.ReadFile("/proc/version")
	if err != nil {
		return probeResult{}, err
	}
	out, err := exec.CommandContext(ctx, r.cfg.Program, "--version").Output()
	if err != nil {
		return probeResult{}, fmt.Errorf("ask %s for its version: %w", r.cfg.Program, err)
	}
	emulator, _, _ := strings.Cut(string(out), "\n")
	return probeResult{HostKernel: strings.TrimSpace(string(version)), Emulator: emulator}, nil
}

func (r *Rig) probeFile(host probeResult) string {
	sum := sha256.Sum256([]byte(host.HostKernel + "\n" + host.Emulator))
	return filepath.Join(r.cfg.Cache, "accelerator-"+hex.EncodeToString(sum[:8])+".json")
}

// cachedProbe: anything unreadable means that the probe is done again.
func (r *Rig) cachedProbe(host probeResult) (probeResult, bool) {
	if r.cfg.Cache == "" {
		return probeResult{}, false
	}
	var got probeResult
	b, err := os.ReadFile(r.probeFile(host))
	if err != nil || json.Unmarshal(b, &got) != nil {
		return probeResult{}, false
	}
	same := got.HostKernel == host.HostKernel && got.Emulator == host.Emulator
	return got, same && (got.Accelerator == accelTCG || got.Accelerator == accelKVM)
}

func (r *Rig) keepProbe(result probeResult) error {
	if r.cfg.Cache == "" {
		return nil
	}
	if err := os.MkdirAll(r.cfg.Cache, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(result, "", "  ")
	if err != nil {
		return err
	}
	// A torn file is harmless: it does not parse, and the probe runs again.
	return os.WriteFile(r.probeFile(result), b, 0o644) //nolint:forbidigo // see above
}
