// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/api"
	"klatch/internal/server/archive"
	"klatch/internal/server/repo"
)

const exportHelp = `export writes what this server holds into one file, for a server that has no
network: all metadata, transparency logs, policies and recalls, and the
livepatches that the filter lets through, and the operator's tiers, of this
server or followed. The file begins with a list of what is in it, with digests.

The file carries no signature of this server: everything in it is signed by the
publisher and the operator already, and import verifies all of it against its own trust anchor.
A file that was changed on the way is refused, whoever changed it.

Metadata lives for two days. Machines behind the gap take livepatches only
while it lives, so carry a new export at least that often when you roll out.`

func exportCommand(dir *string) *cobra.Command {
	var filter repo.Filter
	var asJSON bool
	c := &cobra.Command{
		Use:     "export FILE",
		Short:   "write the repository into one file for a server without a network",
		Long:    exportHelp,
		Example: "  klatch-server export /mnt/stick/klatch.export\n  klatch-server export --distro debian-12 --min-kernel 6.1.0-40 klatch.export",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := openData(*dir)
			if err != nil {
				return cli.Cannot(err, "export to %s", args[0])
			}
			r, err := d.repo(cmd.Context(), slog.New(slog.DiscardHandler))
			if err != nil {
				return cli.Cannot(err, "export to %s", args[0])
			}
			tiers, without := d.tierFiles(cmd.Context(), time.Now())
			if without != nil { // the livepatches are as good without
				fmt.Fprintf(cmd.ErrOrStderr(), "the tiers are not in the file: %s\n", cli.Clean(without.Error())) //nolint:errcheck // told as far as possible
			}
			var m archive.Manifest
			var left []repo.LeftOut
			bytes, sum, err := writeWhole(args[0], func(w io.Writer) error {
				m, left, err = r.Export(cmd.Context(), w, filter, tiers, time.Now())
				return err
			})
			if err != nil {
				return cli.Cannot(err, "export to %s", args[0])
			}
			if asJSON {
				return cli.WriteJSON(cmd.OutOrStdout(), 1, struct {
					File     string             `json:"file"`
					Bytes    int64              `json:"bytes"`
					SHA256   string             `json:"sha256"`
					Files    int                `json:"files"`
					Metadata int64              `json:"metadata_version"`
					Expires  time.Time          `json:"metadata_expires"`
					Recalls  int64              `json:"recalls_version"`
					LeftOut  []adminapi.LeftOut `json:"left_out"`
					Tiers    bool               `json:"tiers"`
				}{args[0], bytes, sum, len(m.Files), m.Metadata, m.Expires, m.Recalls, api.LeftOut(left), len(tiers) > 0})
			}
			w := cmd.OutOrStdout()
			fmt.Fprintf(w, "%s: %d files, %d bytes, metadata %d until %s\nsha256 %s\n", args[0], len(m.Files), bytes, m.Metadata, m.Expires.Format(time.RFC3339), sum) //nolint:errcheck // told as far as possible
			printLeftOut(w, left)
			if time.Until(m.Expires) < 12*time.Hour {
				fmt.Fprintf(cmd.ErrOrStderr(), "the metadata expires at %s; copy again before exporting: klatch-server sync\n", m.Expires.Format(time.RFC3339)) //nolint:errcheck // as above
			}
			return nil
		},
	}
	filterFlags(c.Flags(), &filter)
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}

// writeWhole writes a file of any size that is whole or not there, and gives
// its length and SHA-256.
func writeWhole(path string, write func(io.Writer) error) (bytes int64, sum string, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return 0, "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	c := &counter{w: bufio.NewWriterSize(f, 1<<20), hash: sha256.New()}
	if err = write(c); err == nil {
		err = c.w.Flush()
	}
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return 0, "", err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return 0, "", err
	}
	return c.n, hex.EncodeToString(c.hash.Sum(nil)), durable.SyncDir(filepath.Dir(path))
}

type counter struct {
	w    *bufio.Writer
	hash hash.Hash
	n    int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	c.hash.Write(b[:n])
	return n, err
}

const importHelp = `import takes what export wrote, on a server that needs no network. The file's
form and every digest are checked first, then everything is verified against
the trust anchor as in sync; only then the fleet sees it. It may run beside
serve, which notices, and may be repeated after it was stopped at any moment.

What is signed and not in the file is named: livepatches of which machines here
will hear that they exist, roots of the publisher's metadata that were skipped,
metadata that is older than what this server has seen, or expired.

Tiers in the file are taken where this server follows them: klatch-server
configure --rollout upstream.

With --list it only prints what the file says it holds.`

func importCommand(dir *string) *cobra.Command {
	var asJSON, list bool
	c := &cobra.Command{
		Use:   "import FILE",
		Short: "take a file that export wrote",
		Long:  importHelp,
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := archive.Open(args[0], repo.Exportable)
			if err != nil {
				return cli.Cannot(err, "import %s", args[0])
			}
			defer a.Close() //nolint:errcheck // read only
			if list {
				return cli.Cannot(printArchive(cmd.OutOrStdout(), a, asJSON), "list %s", args[0])
			}
			res, err := importArchive(cmd, *dir, a, args[0])
			if err != nil {
				return cli.Cannot(err, "import %s", args[0])
			}
			return printSync(cmd.OutOrStdout(), res, asJSON)
		},
	}
	c.Flags().BoolVar(&list, "list", false, "only print what the file says it holds")
	c.Flags().BoolVar(&asJSON, "json", false, "print the result for programs")
	return c
}

func importArchive(cmd *cobra.Command, dir string, a *archive.Archive, name string) (repo.Result, error) {
	d, err := openData(dir)
	if err != nil {
		return repo.Result{}, err
	}
	now := time.Now()
	steps := cli.NewProgress(cmd.ErrOrStderr())
	steps.Step("check %d files", len(a.Files))
	err = a.Check(cmd.Context(), func(done, total int64) { steps.Step("checked %d of %d MiB", done>>20, total>>20) })
	if err != nil {
		return repo.Result{}, err
	}
	r, err := d.repo(cmd.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		return repo.Result{}, err
	}
	if err := r.Load(cmd.Context(), now); err != nil && cmd.Context().Err() != nil {
		return repo.Result{}, err
	}
	install, broken := nothing, error(nil)
	if d.Rollout == rolloutUpstream && !a.Has("rollout/metadata/timestamp.json") {
		broken = fault.New(fault.NotFound, "import_no_tiers", "this server follows tiers, and the file has none; the old ones stay").
			WithHint("export at a server that keeps or follows them: klatch-server rollout status there")
	} else {
		install, broken = d.fetchTiers(cmd.Context(), d.settings, "file "+name, "file://localhost", repo.Reader(a), now)
	}
	res, err := r.Import(cmd.Context(), a, d.rules(), progress(cmd.ErrOrStderr()), now)
	err = errors.Join(err, broken, install())
	if cmd.Context().Err() != nil {
		return res, err
	}
	return res, errors.Join(err, d.noteSync("file "+name, now, err))
}

func printArchive(w io.Writer, a *archive.Archive, asJSON bool) error {
	if asJSON {
		return cli.WriteJSON(w, 1, a.Manifest)
	}
	if _, err := fmt.Fprintf(w, "publisher %s, made %s, filter: %s\nmetadata %d until %s, recalls %d\n", cli.Clean(a.Publisher), a.Created.Format(time.RFC3339), cli.Clean(a.Filter),
		a.Metadata, a.Expires.Format(time.RFC3339), a.Recalls); err != nil {
		return err
	}
	for _, f := range a.Files {
		if _, err := fmt.Fprintf(w, "%10d  %s\n", f.Bytes, f.Name); err != nil {
			return err
		}
	}
	return nil
}
