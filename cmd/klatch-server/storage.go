// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/obs"
	"klatch/internal/server/blob"
	"klatch/internal/server/blob/fsblob"
	"klatch/internal/server/blob/s3blob"
)

// openStorage opens a place as a person writes it: an s3:// address, an
// absolute folder, or nothing for the data folder's own.
func openStorage(ctx context.Context, dir, place string) (blob.Store, error) {
	switch {
	case place == "":
		return fsblob.New(filepath.Join(dir, copyDir)), nil
	case strings.HasPrefix(place, "s3://"):
		return s3blob.Open(ctx, place)
	case filepath.IsAbs(place):
		return fsblob.New(filepath.Clean(place)), nil
	}
	return nil, fault.New(fault.Invalid, "bad_storage", "%.200q is neither an s3:// address nor an absolute folder", place).
		WithHint("write it as s3://BUCKET/PREFIX?endpoint=https://s3.example.org, or as /srv/klatch")
}

// movable is the storage of a running serve: what storage move has done, it
// follows.
type movable struct {
	dir   string
	place string // of the store in force; one goroutine uses it
	now   atomic.Pointer[blob.Store]
}

func newMovable(ctx context.Context, d *data) (*movable, error) {
	m := &movable{dir: d.dir, place: d.Storage}
	s, err := openStorage(ctx, d.dir, d.Storage)
	if err == nil {
		m.now.Store(&s)
	}
	return m, err
}

func (m *movable) follow(ctx context.Context, place string, log *slog.Logger) {
	if place == m.place {
		return
	}
	s, err := openStorage(ctx, m.dir, place)
	if err != nil {
		log.LogAttrs(ctx, slog.LevelError, "storage cannot be opened; the old one is used on", obs.Err(err))
	} else {
		m.now.Store(&s)
		log.LogAttrs(ctx, slog.LevelInfo, "storage moved", slog.String("to", s.Place()))
	}
	m.place = place // an error is told once
}

func (m *movable) Open(ctx context.Context, name string) (blob.Reader, error) {
	return (*m.now.Load()).Open(ctx, name)
}

func (m *movable) Put(ctx context.Context, name string, content []byte, h blob.Header) error {
	return (*m.now.Load()).Put(ctx, name, content, h)
}

func (m *movable) List(ctx context.Context, prefix string) ([]string, error) {
	return (*m.now.Load()).List(ctx, prefix)
}

func (m *movable) Delete(ctx context.Context, name string) error {
	return (*m.now.Load()).Delete(ctx, name)
}

func (m *movable) Place() string { return (*m.now.Load()).Place() }

const storageHelp = `storage says where the copy of the repository lies: in the data folder, in
another folder, or in an object store that speaks S3. Objects carry the headers
that a network of caches needs, so a bucket may be served without this server.

The object store's credentials come from AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, or from the shared files of its tools; they are in no
file of this server.`

func storageCommand(dir *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "storage",
		Short: "say where the copy lies",
		Long:  storageHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := readSettings(*dir)
			if err != nil {
				return cli.Cannot(err, "say where the copy lies")
			}
			place := cmp.Or(s.Storage, filepath.Join(*dir, copyDir))
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]string{"storage": place})
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), place)
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print it for programs")
	c.AddCommand(storageMove(dir))
	return c
}

func storageMove(dir *string) *cobra.Command {
	var to string
	var asJSON bool
	c := &cobra.Command{
		Use:   "move --to PLACE",
		Short: "move the copy to another place",
		Long: `move copies every file to another place, reads each back there, and verifies
the whole there against the trust anchor. Only then the place is switched; a
running serve follows within seconds. The old files stay: delete them by hand.
A move that was stopped goes on where it was.

PLACE is s3://BUCKET/PREFIX?endpoint=URL&region=REGION&path_style=true, of which
all but the bucket may be left out, or an absolute folder; with --to "" it is
the data folder again.`,
		Example: "  klatch-server storage move --to 's3://livepatches?region=eu-central-1'\n  klatch-server storage move --to /srv/klatch",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := openData(*dir)
			if err != nil {
				return cli.Cannot(err, "move to %s", to)
			}
			files, err := d.move(cmd, to)
			if err != nil {
				return cli.Cannot(err, "move to %s", to)
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, map[string]any{"storage": cmp.Or(to, d.path(copyDir)), "was": cmp.Or(d.Storage, d.path(copyDir)), "files": files})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d files are in %s and verified there; the old ones are still in %s\n", files, cmp.Or(to, d.path(copyDir)), cmp.Or(d.Storage, d.path(copyDir)))
			return err
		},
	}
	c.Flags().StringVar(&to, "to", "", "the new place")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	if err := c.MarkFlagRequired("to"); err != nil {
		panic(err) // the flag is two lines above
	}
	return c
}

func (d *data) move(cmd *cobra.Command, to string) (int, error) {
	ctx := cmd.Context()
	if to == d.Storage {
		return 0, fault.New(fault.Conflict, "storage_same", "the copy lies there already")
	}
	target, err := openStorage(ctx, d.dir, to)
	if err != nil {
		return 0, err
	}
	r, err := d.repo(ctx, slog.New(slog.DiscardHandler))
	if err != nil {
		return 0, err
	}
	steps := cli.NewProgress(cmd.ErrOrStderr())
	tell := func(done, total int, name string) {
		if done%100 == 0 {
			steps.Step("%d of %d: %s", done+1, total, name)
		}
	}
	return r.MoveTo(ctx, target, tell, func() error {
		s, err := readSettings(d.dir)
		if err != nil {
			return err
		}
		s.Storage = to
		return writeSettings(d.dir, s)
	}, time.Now())
}
