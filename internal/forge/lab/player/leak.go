// SPDX-License-Identifier: Apache-2.0

package player

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/forge/lab"
)

// leakProbe holds what the kernel's memory was at each look.
type leakProbe struct{ looks []memory }

// memory is what the kernel holds: objects by slab cache, and pages that
// belong to nothing that /proc/meminfo counts.
type memory struct {
	caches map[string]cache
	pages  int
	cpus   int
}

type cache struct{ objects, perSlab int }

// defaultCalls is how many calls a round has that does not say. What grows by
// half of them or more in each of two rounds grows with the calls.
//
// SLUB counts a slab that a CPU works on as full. So a cache must also have
// grown by more than one slab for each CPU: of 64 bytes by 128 objects where
// there are two, which happens without any leak. Leaks of objects under 32
// bytes are not found by 150 calls for that reason.
const defaultCalls = 150

// lazy are caches that grow with processes and are emptied only now and then:
// areas of kernel stacks wait for up to 32 MiB of them (mm/vmalloc.c,
// lazy_max_pages). What they describe is counted as pages.
var lazy = []string{"vmap_area"}

func leakArgs(args []string) error {
	if len(args) == 0 || len(args) > 2 || !slices.Contains([]string{"begin", "again", "end"}, args[0]) {
		return errors.New("want begin, again or end")
	}
	if len(args) == 2 {
		if args[0] != "end" {
			return errors.New("only end takes a number of calls")
		}
		return oneCount(args[1])
	}
	return nil
}

// settleScript frees what is free to be freed, so that only what is in use is
// counted: caches of files, and free objects that each CPU keeps, after a grace
// period. No program is started between that and the reading: it would bring
// slabs back.
const settleScript = `sync
echo 3 > /proc/sys/vm/drop_caches
sleep 1
for f in /sys/kernel/slab/*/shrink; do echo 1 > $f; done 2>/dev/null
slabs=
while read -r line; do slabs="$slabs$line
"; done < /proc/slabinfo
echo "== slabs"
echo "$slabs"
echo "== zones"
cat /proc/zoneinfo
echo "== memory"
cat /proc/meminfo`

func (p *Player) leakProbe(ctx context.Context, c call) error {
	if word, n := c.args[0], len(p.leak.looks); word == "begin" {
		p.leak.looks = nil
	} else if want := map[string]int{"again": 1, "end": 2}[word]; n != want {
		return lab.Brokenf(fmt.Errorf("%s after %d looks", word, n), "probe for leaks: begin, again, end")
	}
	m, err := p.lookAtMemory(ctx)
	if err != nil {
		return err
	}
	// What is under way for a moment, up to 370 pages were seen, must not make
	// the way from first to last longer.
	if c.args[0] != "again" {
		m2, err := p.lookAtMemory(ctx)
		if err != nil {
			return err
		}
		which := minInt
		if c.args[0] == "begin" {
			which = maxInt
		}
		m = m.either(m2, which)
	}
	p.leak.looks = append(p.leak.looks, m)
	if c.args[0] != "end" {
		return nil
	}
	calls := defaultCalls
	if len(c.args) > 1 {
		if calls, err = positive(c.args[1], maxCalls); err != nil {
			return err
		}
	}
	p.note, err = p.leak.compare(calls)
	return err
}

func (p *Player) lookAtMemory(ctx context.Context) (memory, error) {
	res, err := p.m.Run(ctx, lab.Command{Argv: []string{"sh", "-c", settleScript}, Timeout: 2 * time.Minute})
	if err != nil {
		return memory{}, err
	}
	if res.Exit != 0 || res.TimedOut || res.Truncated {
		return memory{}, lab.Brokenf(fmt.Errorf("exit status %d: %s", res.Exit, shorten(string(res.Stderr))), "look at the kernel's memory")
	}
	m, err := readMemory(string(res.Stdout))
	return m, lab.Brokenf(err, "look at the kernel's memory")
}

func maxInt(a, b int) int { return max(a, b) }
func minInt(a, b int) int { return min(a, b) }

// either takes the larger, or the smaller, of each number of two looks.
func (m memory) either(other memory, which func(a, b int) int) memory {
	out := memory{caches: map[string]cache{}, pages: which(m.pages, other.pages), cpus: m.cpus}
	for name, c := range m.caches {
		out.caches[name] = cache{which(c.objects, other.caches[name].objects), c.perSlab}
	}
	return out
}

// compare says what grew with the calls.
func (l leakProbe) compare(calls int) (note string, err error) {
	a, b, c := l.looks[0], l.looks[1], l.looks[2]
	grew := (calls + 1) / 2
	var leaks []string
	most, of := 0, "nothing"
	for _, name := range slices.Sorted(maps.Keys(c.caches)) {
		if slices.Contains(lazy, name) {
			continue
		}
		first, second := b.caches[name].objects-a.caches[name].objects, c.caches[name].objects-b.caches[name].objects
		least := min(first, second)
		if least > most {
			most, of = least, name
		}
		if least >= grew && first+second > c.cpus*c.caches[name].perSlab {
			leaks = append(leaks, fmt.Sprintf("%s by %d and %d objects", name, first, second))
		}
	}
	first, second := b.pages-a.pages, c.pages-b.pages
	if min(first, second) >= grew {
		leaks = append(leaks, fmt.Sprintf("pages by %d and %d", first, second))
	}
	if len(leaks) > 0 {
		return "", lab.Failf("the kernel's memory grows with the calls, in two rounds of %d: %s", calls, strings.Join(leaks, "; "))
	}
	return fmt.Sprintf("two rounds of %d calls: %s grew most, by %d objects; pages by %d and %d", calls, of, most, first, second), nil
}

// counted are the parts of MemTotal in /proc/meminfo that are not the
// kernel's own pages, or are counted as slab objects.
var counted = []string{"MemFree", "Buffers", "Cached", "SwapCached", "AnonPages", "Slab", "KernelStack", "PageTables"}

const pageKiB = 4

func readMemory(text string) (memory, error) {
	m := memory{caches: map[string]cache{}}
	_, rest, ok1 := strings.Cut(text, "== slabs\n")
	slabs, rest, ok2 := strings.Cut(rest, "== zones\n")
	zones, info, ok3 := strings.Cut(rest, "== memory\n")
	if !ok1 || !ok2 || !ok3 {
		return m, errors.New("a part of it is missing")
	}
	for line := range strings.Lines(slabs) {
		f := strings.Fields(line)
		if len(f) < 5 || f[0] == "#" || f[0] == "slabinfo" {
			continue
		}
		objects, err1 := strconv.Atoi(f[1])
		perSlab, err2 := strconv.Atoi(f[4])
		if err := errors.Join(err1, err2); err != nil {
			return m, fmt.Errorf("slabinfo %q: %w", line, err)
		}
		m.caches[f[0]] = cache{objects, perSlab}
	}
	kib := map[string]int{}
	for line := range strings.Lines(info) {
		name, rest, _ := strings.Cut(line, ":")
		if f := strings.Fields(rest); len(f) > 0 {
			n, err := strconv.Atoi(f[0])
			if err != nil {
				return m, fmt.Errorf("meminfo %q: %w", line, err)
			}
			kib[name] = n
		}
	}
	if kib["MemTotal"] == 0 || len(m.caches) == 0 {
		return m, errors.New("no MemTotal, or no slab")
	}
	m.pages = kib["MemTotal"]
	for _, c := range counted {
		m.pages -= kib[c]
	}
	m.pages /= pageKiB
	// Free pages that a CPU keeps for itself are not in MemFree.
	for line := range strings.Lines(zones) {
		f := strings.Fields(line)
		if len(f) != 2 || f[0] != "count:" && f[0] != "cpu:" {
			continue
		}
		n, err := strconv.Atoi(f[1])
		if err != nil {
			return m, fmt.Errorf("zoneinfo %q: %w", line, err)
		}
		if f[0] == "cpu:" {
			m.cpus = max(m.cpus, n+1)
		} else {
			m.pages -= n
		}
	}
	return m, nil
}
