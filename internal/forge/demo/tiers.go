// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/livepatch"
	"klatch/internal/rollout"
)

// tier is the guest's: the second one, which people open.
const tier = "fleet"

// operator makes the operator's repository on the server, in profile lab.
func (d *Demo) operator(ctx context.Context) error {
	return d.command(ctx, shown, d.program("klatch-server"), "--data", filepath.Join(d.Work, "server"), "rollout", "init",
		"--operator", "ops.klatch-demo", "--profile", "lab", "--anchor-file", d.rolloutAnchor(), "--tier", "canary", "--tier", tier)
}

func (d *Demo) rolloutAnchor() string { return filepath.Join(d.Work, "rollout.json") }

// fleet runs the operator's tool.
func (d *Demo) fleet(ctx context.Context, args ...string) error {
	return d.command(ctx, shown, d.program("klatch-fleet"), append([]string{"--server", d.server.admin, "--token-file", d.adminToken()}, args...)...)
}

func (d *Demo) adminToken() string { return filepath.Join(d.Work, "admin-token") }

// waits shows that the machine loads nothing before its tier is open.
func (d *Demo) waits(ctx context.Context) error {
	if err := d.klatch(ctx, "check"); err != nil {
		return err
	}
	out, err := d.in(ctx, quietly, "klatch", "status", "--json")
	if err != nil {
		return err
	}
	var s status
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return fmt.Errorf("read status: %w", err)
	}
	if s.State.Reason != rollout.CodeNotSelected || s.State.Sequence != 0 {
		return fmt.Errorf("the machine's tier is not open, and it says %s", out)
	}
	if err := d.flaws(ctx, "not promoted", true, true); err != nil {
		return err
	}
	return d.fleet(ctx, "tier", "list")
}

// promote opens the guest's tier for all that the first tier has.
func (d *Demo) promote(ctx context.Context, why string) error {
	if err := d.fleet(ctx, "promote", tier, "--all", "--reason", why); err != nil {
		return err
	}
	d.row("tier "+tier, "opened by a signed promotion (in lab its key lies on the server, else with two people): %s", why)
	return d.klatch(ctx, "check")
}

// selects waits until the running server has chosen that sequence for the
// first tier: it looks every two seconds.
func (d *Demo) selects(ctx context.Context, seq livepatch.Sequence) error {
	token, err := os.ReadFile(d.adminToken())
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		var now struct {
			Tiers []struct {
				Selected []struct {
					Sequence livepatch.Sequence `json:"sequence"`
				} `json:"selected"`
			} `json:"tiers"`
		}
		if err := d.server.get(ctx, strings.TrimSpace(string(token)), "/api/v1/rollout", &now); err != nil {
			return err
		}
		if len(now.Tiers) > 0 && len(now.Tiers[0].Selected) > 0 && now.Tiers[0].Selected[0].Sequence == seq {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
	return fmt.Errorf("the server does not choose sequence %d for its first tier", seq)
}
