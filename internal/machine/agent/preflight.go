// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"path/filepath"

	"klatch/internal/durable"
	"klatch/internal/livepatch"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/machine/facts"
	"klatch/internal/trust"
)

// judgeKeys asks what the kernel will say to the publisher's module keys.
func (o *observation) judgeKeys(m facts.Machine, anchor *trust.Anchor) {
	o.firmware = bootkeys.Read(m.Root)
	v := o.judge(anchor)
	o.KeyTrust = &v
	o.Facts.SecureBoot, o.Facts.KeyTrust = string(v.SecureBoot), string(v.Word)
}

// unrecalled is the anchor without the keys of the recalls that were seen last;
// those that cannot be read fail the next check, which fetches them anew.
func (a *Agent) unrecalled(anchor *trust.Anchor) *trust.Anchor {
	b, err := durable.ReadFile(filepath.Join(a.cfg.Dir, "recalls.note"), livepatch.MaxRecalls)
	if err != nil {
		return anchor
	}
	r, err := anchor.OpenRecalls(b)
	if err != nil {
		return anchor
	}
	return without(anchor, r)
}

func (o observation) judge(anchor *trust.Anchor) bootkeys.Verdict {
	return bootkeys.Judge(bootkeys.Kernel{Lockdown: o.Facts.Lockdown, Enforced: o.Facts.Enforced}, o.firmware, anchor.ModuleKeys)
}

// askKernel stays where it is certain that the kernel would refuse: nothing is
// downloaded and nothing tried. It is no failure, for there is nothing wrong
// with what was offered. The anchor is without recalled keys.
func (t *trial) askKernel(context.Context) error {
	if v := t.o.judge(t.anchor); v.Word == bootkeys.Refused {
		t.done = &Check{Result: resultCurrent, Code: v.Code, Text: v.Text}
	}
	return nil
}

// keyRefused is the verdict that stands in the way of the first livepatch. What
// is loaded speaks for itself.
func (o observation) keyRefused() *bootkeys.Verdict {
	if o.KeyTrust == nil || o.KeyTrust.Word != bootkeys.Refused || o.loaded() != 0 {
		return nil
	}
	return o.KeyTrust
}
