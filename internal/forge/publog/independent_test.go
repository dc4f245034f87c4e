// SPDX-License-Identifier: Apache-2.0

package publog_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/api/layout"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"klatch/internal/forge/publog"
	"klatch/internal/forge/witness"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
)

// TestProofsHoldInTwoImplementations: a log that Tessera wrote, 1,000 random
// pairs of size and index. Go's sumdb/tlog and the merkle library must compute
// the same roots, and each must accept the other's proofs; and 200 pairs of
// sizes for consistency.
func TestProofsHoldInTwoImplementations(t *testing.T) {
	d := withLog(t)
	mustPublish(t, d, some(150)) // 300 entries
	_, whole := openLog(t, d)
	n := len(whole.Entries)
	roots := make([][]byte, n+1) // by the merkle library
	r := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)
	for i, e := range whole.Entries {
		if err := r.Append(rfc6962.DefaultHasher.HashLeaf(e.Encode()), nil); err != nil {
			t.Fatal(err)
		}
		var err error
		if roots[i+1], err = r.GetRootHash(nil); err != nil {
			t.Fatal(err)
		}
	}
	root := func(size int) tlog.Hash {
		t.Helper()
		h, err := whole.RootAt(int64(size)) // by sumdb/tlog
		if err != nil || h != tlog.Hash(roots[size]) {
			t.Fatalf("roots at %d differ: %s, %x, %v", size, h, roots[size], err)
		}
		return h
	}
	files, err := whole.Files()
	if err != nil {
		t.Fatal(err)
	}
	tiles := map[string][]byte{}
	for _, f := range files {
		tiles[f.Name] = f.Content
	}
	fetch := func(_ context.Context, level, index uint64, p uint8) ([]byte, error) {
		b := tiles[layout.TilePath(level, index, layout.PartialTileSize(level, index, uint64(n)))]
		if w := int(p) * tlog.HashSize; p > 0 && w <= len(b) {
			b = b[:w]
		}
		if b == nil {
			return nil, os.ErrNotExist
		}
		return b, nil
	}
	parts := map[int]*translog.Log{}       // the log as it was at a size
	rnd := rand.New(rand.NewPCG(27, 1000)) // the same ones each time
	for range 1000 {
		size := 1 + rnd.IntN(n)
		index := rnd.IntN(size)
		leaf := whole.Entries[index].Encode()
		h := root(size)

		pb, err := client.NewProofBuilder(t.Context(), uint64(size), fetch)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := pb.InclusionProof(t.Context(), uint64(index))
		if err != nil {
			t.Fatal(err)
		}
		if err := tlog.CheckRecord(hashes(theirs), int64(size), h, int64(index), tlog.RecordHash(leaf)); err != nil {
			t.Fatalf("their proof of %d in %d: %v", index, size, err)
		}
		if parts[size] == nil {
			parts[size], err = translog.Build(whole.Checkpoint.Origin, whole.Entries[:size], func(string) ([]byte, error) { return nil, nil })
			if err != nil {
				t.Fatal(err)
			}
		}
		ours, err := parts[size].Prove(int64(index), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, uint64(index), uint64(size), rfc6962.DefaultHasher.HashLeaf(leaf), lists(ours.Path), roots[size]); err != nil {
			t.Fatalf("our proof of %d in %d: %v", index, size, err)
		}
	}
	for range 200 {
		old := 1 + rnd.IntN(n)
		ours, err := whole.ProveExtends(int64(old))
		if err != nil {
			t.Fatal(err)
		}
		if err := proof.VerifyConsistency(rfc6962.DefaultHasher, uint64(old), uint64(n), lists(ours), roots[old], roots[n]); err != nil {
			t.Fatalf("our proof from %d: %v", old, err)
		}
	}
}

func hashes(bs [][]byte) (out []tlog.Hash) {
	for _, b := range bs {
		out = append(out, tlog.Hash(b))
	}
	return out
}

func lists(hs []tlog.Hash) (out [][]byte) {
	for _, h := range hs {
		out = append(out, h[:])
	}
	return out
}

// TestTesserasOwnCheckerAcceptsTheFolder: what lies in the repository is a log
// by C2SP tlog-tiles, partial tiles removed.
func TestTesserasOwnCheckerAcceptsTheFolder(t *testing.T) {
	d := withLog(t)
	for _, n := range []int{1, 100, 130, 140} {
		mustPublish(t, d, some(n))
	}
	l, whole := openLog(t, d)
	if left, err := filepath.Glob(filepath.Join(l.Dir, "tile/*/000.p")); err != nil || len(left) != 1 { // of level 1
		t.Errorf("partial tiles %v, %v", left, err)
	}
	v, err := note.NewVerifier(l.Key().String())
	if err != nil {
		t.Fatal(err)
	}
	hasher := func(b []byte) (out [][]byte, err error) {
		for len(b) > 0 {
			size := int(b[0])<<8 | int(b[1])
			out = append(out, rfc6962.DefaultHasher.HashLeaf(b[2:2+size]))
			b = b[2+size:]
		}
		return out, nil
	}
	src := client.FileFetcher{Root: l.Dir}
	if err := fsck.New(whole.Checkpoint.Origin, v, src, hasher, fsck.Opts{N: 2}).Check(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAnotherLogCanAskOurWitness: Tessera's own witness client, which follows
// C2SP tlog-witness, gets its checkpoints cosigned.
func TestAnotherLogCanAskOurWitness(t *testing.T) {
	l := logsim.New(t, "elsewhere.example/log", 0)
	secret := logsim.Secret(t, "elsewhere.example/log")
	l.UseKey(secret)
	signer, err := note.NewSigner(secret)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, witness.KeyFile), []byte(logsim.Secret(t, "w.example")), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := witness.Open(dir, []string{l.Key.String()})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	s := httptest.NewServer(w.Handler(slog.New(slog.DiscardHandler)))
	defer s.Close()
	at, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	asked, err := tessera.NewWitness(w.Key().String(), at)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	driver, err := posix.New(ctx, posix.Config{Path: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	a, shutdown, reader, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().WithCheckpointSigner(signer).
		WithCheckpointInterval(100*time.Millisecond).WithBatching(2, 5*time.Millisecond).
		WithWitnesses(tessera.NewWitnessGroup(1, asked), &tessera.WitnessOptions{}))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 9 {
		if _, err := a.Add(ctx, tessera.NewEntry(fmt.Appendf(nil, "entry %d", i)))(); err != nil {
			t.Fatal(err)
		}
	}
	if err := shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	signed, err := reader.ReadCheckpoint(ctx)
	if err != nil {
		t.Fatal(err)
	}
	p, err := translog.ParsePolicy(fmt.Sprintf("log %s\nwitness w %s\nquorum w\n", l.Key, w.Key()))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := p.Open(signed); err != nil || c.Size != 9 {
		t.Errorf("checkpoint %+v, %v", c, err)
	}
}

// BenchmarkAppend is what publishing one more livepatch with its evidence costs
// in a log of that size, without witnesses.
func BenchmarkAppend(b *testing.B) {
	for _, n := range []int{500, 5000} {
		d := withLog(b)
		l, err := publog.Open(d)
		if err != nil {
			b.Fatal(err)
		}
		all := some(n/2 + 10000)
		if err := publog.AppendForTest(b.Context(), l, all[:n]); err != nil {
			b.Fatal(err)
		}
		next := n
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := publog.AppendForTest(b.Context(), l, all[next:next+2]); err != nil {
					b.Fatal(err)
				}
				next += 2
			}
		})
	}
}
