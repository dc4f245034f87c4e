// SPDX-License-Identifier: Apache-2.0

package publish_test

import (
	"os"
	"path/filepath"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/trust"
	"klatch/internal/tufrepo"
)

// TestFolderFromBeforeReleaseRoles: livepatches lie in the top list. In profile
// lab the next publication moves them; elsewhere they stay until a ceremony adds
// the role.
func TestFolderFromBeforeReleaseRoles(t *testing.T) {
	for _, profile := range []trust.Profile{trust.Lab, trust.Small} {
		t.Run(string(profile), func(t *testing.T) {
			d := folder(t, profile)
			b := built(t, d, 1)
			if _, err := sign.Sign(d, b, now); err != nil {
				t.Fatal(err)
			}
			content, err := os.ReadFile(sign.BundleFile(d, b))
			if err != nil {
				t.Fatal(err)
			}
			keys, err := sign.RepositoryKeys(d, sign.All)
			if err != nil {
				t.Fatal(err)
			}
			const path = "debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb"
			flat := tufrepo.Publication{Targets: []tufrepo.Target{{Path: path, Content: content}}}
			if _, err := tufrepo.Publish(t.Context(), d.Repository(), flat, keys, now); err != nil {
				t.Fatal(err)
			}
			if _, err := publish.Publish(t.Context(), d, []build.Result{b}, now); err != nil {
				t.Fatal(err)
			}
			s, err := tufrepo.Look(d.Repository())
			if err != nil {
				t.Fatal(err)
			}
			if moved := s.For(path) != nil; moved != (profile == trust.Lab) {
				t.Errorf("in a release role: %v", moved)
			}
			made, err := filepath.Glob(filepath.Join(d.Keys(), "release-*.key"))
			if err != nil || (len(made) > 0) != (profile == trust.Lab) {
				t.Errorf("keys %q, %v", made, err)
			}
			if profile == trust.Lab {
				return
			}
			// With one release role there, another sort of kernel needs its own.
			r, err := sign.MakeReleaseKeys(d, "debian-13", "amd64")
			if err != nil {
				t.Fatal(err)
			}
			if keys, err = sign.RepositoryKeys(d, sign.All); err != nil {
				t.Fatal(err)
			}
			p := tufrepo.Publication{Roles: []tufrepo.ReleaseRole{r}}
			if _, err := tufrepo.Publish(t.Context(), d.Repository(), p, keys, now); err != nil {
				t.Fatal(err)
			}
			if _, err := publish.Publish(t.Context(), d, []build.Result{b}, now); fault.CodeOf(err) != "no_release_role" {
				t.Errorf("a kernel without a release role: %v", err)
			}
		})
	}
}
