// SPDX-License-Identifier: Apache-2.0

package translog_test

import (
	"fmt"
	"testing"

	"klatch/internal/translog"
)

// BenchmarkVerify is what a machine does for one offered livepatch, without
// the network: proof, log signature, two cosignatures.
func BenchmarkVerify(b *testing.B) {
	for _, n := range []int{500, 5000} {
		l := filled(b, n)
		p := policy(b, l.Policy(2))
		proof := l.Proof(int64(n/2), 0, 1).Encode()
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := p.Verify(proof, l.Entries[n/2]); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(len(proof)), "proof-bytes")
		})
	}
}

// BenchmarkExtends is what a machine does when the log has grown by a fifth.
func BenchmarkExtends(b *testing.B) {
	for _, n := range []int{500, 5000} {
		l := filled(b, n)
		old := l.Fork()
		old.Entries = old.Entries[:n*4/5]
		head, from, files := l.Whole().Checkpoint, old.Whole().Checkpoint, read(l)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := translog.Extends(b.Context(), files, head, from); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkReadLog is an auditor's or a mirror's whole look.
func BenchmarkReadLog(b *testing.B) {
	for _, n := range []int{500, 5000} {
		l := filled(b, n)
		head, files := l.Whole().Checkpoint, read(l)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := translog.ReadLog(b.Context(), files, head); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
