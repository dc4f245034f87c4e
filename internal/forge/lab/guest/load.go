// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// LoadArg is the argument that makes a guest's init program put load on the
// machine instead, followed by how long: AgentName, LoadArg, "60s".
const LoadArg = "klatch-lab-load"

// load keeps a machine busy with what most programs do: files and the page
// cache, sockets, processes, pipes and memory. Each kind checks its own
// answers, so that a kernel that gives wrong ones is noticed. It prints how
// often each was done; a kind that was not done once is an error.
func load(d time.Duration, out io.Writer) error {
	// A small guest's loopback is down; ifconfig is in its busybox.
	_ = exec.CommandContext(context.Background(), "ifconfig", "lo", "127.0.0.1", "up").Run()
	dir, err := os.MkdirTemp("", "load-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // in a guest that is thrown away
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	kinds := []struct {
		name string
		once func(ctx context.Context, dir string) error
	}{{"files", files}, {"page cache", pageCache}, {"tcp", tcp}, {"unix", unixPair}, {"processes", process}, {"memory", memory}}
	// What is under way when the time is over fails by its own deadline, which
	// may be noticed before the context's.
	deadline, _ := ctx.Deadline()
	end := deadline.Add(-250 * time.Millisecond)
	counts := make([]atomic.Int64, len(kinds))
	errs := make([]error, len(kinds))
	var wg sync.WaitGroup
	for i, k := range kinds {
		wg.Go(func() {
			own := filepath.Join(dir, fmt.Sprint(i))
			if errs[i] = os.Mkdir(own, 0o700); errs[i] != nil {
				return
			}
			for ctx.Err() == nil {
				err := k.once(ctx, own)
				switch {
				case err == nil:
					counts[i].Add(1)
				case time.Until(end) > 0 && ctx.Err() == nil:
					errs[i] = fmt.Errorf("%s: %w", k.name, err)
					return
				}
			}
		})
	}
	wg.Wait()
	for i, k := range kinds {
		fmt.Fprintf(out, "%s %d\n", k.name, counts[i].Load()) //nolint:errcheck // standard output
		if counts[i].Load() == 0 && errs[i] == nil {
			errs[i] = fmt.Errorf("%s: not done once in %s", k.name, d)
		}
	}
	return errors.Join(errs...)
}

func files(_ context.Context, dir string) error {
	want := bytes.Repeat([]byte("klatch"), 700)
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := os.WriteFile(a, want, 0o600); err != nil { //nolint:forbidigo // a torn file is what a crash leaves here
		return err
	}
	if err := errors.Join(os.Symlink("a", filepath.Join(dir, "l")), os.Remove(filepath.Join(dir, "l")), os.Rename(a, b)); err != nil {
		return err
	}
	have, err := os.ReadFile(b)
	if err != nil || !bytes.Equal(have, want) {
		return fmt.Errorf("read %d bytes back, wrote %d: %w", len(have), len(want), err)
	}
	if _, err := os.ReadDir("/proc/self/fd"); err != nil {
		return err
	}
	return os.Remove(b)
}

func pageCache(_ context.Context, dir string) error {
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // scratch
	block := bytes.Repeat([]byte{0x5a}, 256<<10)
	for range 32 {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	page, err := syscall.Mmap(int(f.Fd()), 0, len(block), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return err
	}
	page[4097]++
	if err := syscall.Munmap(page); err != nil {
		return err
	}
	one := make([]byte, 1)
	if _, err := f.ReadAt(one, 4097); err != nil || one[0] != 0x5b {
		return fmt.Errorf("a mapped byte reads %#x: %w", one[0], err)
	}
	return f.Truncate(0)
}

func tcp(ctx context.Context, _ string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close() //nolint:errcheck // scratch
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // scratch
	return echo(c, 64<<10)
}

func unixPair(_ context.Context, _ string) error {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	a, b := os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	defer a.Close() //nolint:errcheck // scratch
	go func() {
		_, _ = io.Copy(b, b)
		_ = b.Close()
	}()
	return echo(a, 4<<10)
}

// echo sends bytes and wants them back.
func echo(c io.ReadWriter, n int) error {
	want := bytes.Repeat([]byte("0123456789abcdef"), n/16)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		sent <- err
	}()
	have := make([]byte, n)
	if _, err := io.ReadFull(c, have); err != nil {
		return err
	}
	if err := <-sent; err != nil {
		return err
	}
	if !bytes.Equal(have, want) {
		return errors.New("other bytes came back")
	}
	return nil
}

func process(ctx context.Context, _ string) error {
	out, err := exec.CommandContext(ctx, "sh", "-c", "echo a | cat; (exit 3); echo $?").Output() //nolint:gosec // a constant; the time limit is what gosec sees
	if err == nil && string(out) != "a\n3\n" {
		return fmt.Errorf("a shell said %q", out)
	}
	return err
}

func memory(_ context.Context, _ string) error {
	const size = 16 << 20
	m, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return err
	}
	for i := 0; i < size; i += 4096 {
		if m[i] != 0 {
			return fmt.Errorf("new memory is not zero at %#x", i)
		}
		m[i] = 1
	}
	if err := syscall.Madvise(m[:size/2], syscall.MADV_DONTNEED); err != nil {
		return err
	}
	if m[0] != 0 || m[size/2] != 1 {
		return errors.New("memory that was given back still has its content")
	}
	return syscall.Munmap(m)
}
