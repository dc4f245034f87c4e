// SPDX-License-Identifier: Apache-2.0

package publish

import (
	"path"
	"path/filepath"
	"time"

	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/notices"
	"klatch/internal/tufrepo"
)

// addNotices adds what machines are told of their kernel builds, and takes back
// what was published and is said no longer.
func addNotices(d datadir.Dir, signed []build.Result, now time.Time, p *tufrepo.Publication) error {
	told, silent, err := notices.Targets(d, signed, now)
	if err != nil {
		return err
	}
	p.Targets = append(p.Targets, told...)
	for _, name := range silent {
		// The file's name begins with its digest (package tufrepo).
		found, err := filepath.Glob(filepath.Join(d.Repository(), "targets", filepath.FromSlash(path.Dir(name)), "*."+path.Base(name)))
		if err != nil {
			return err
		}
		if len(found) > 0 {
			p.Withdraw = append(p.Withdraw, name)
		}
	}
	return nil
}
