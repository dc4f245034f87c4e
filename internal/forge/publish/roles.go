// SPDX-License-Identifier: Apache-2.0

package publish

import (
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
	"klatch/internal/tufrepo"
)

// releaseRoles adds to a publication the release roles that its livepatches
// need and the repository does not have. In profile lab, and for the first
// publication, their keys are made here; later keys of a role that this host holds say that it is wanted,
// and everything else is a ceremony. A repository from before there were such
// roles keeps its one list until somebody adds one.
func releaseRoles(d datadir.Dir, p *tufrepo.Publication) error {
	state, err := tufrepo.Look(d.Repository())
	if err != nil {
		return err
	}
	if state.Unfinished {
		return fault.New(fault.Conflict, "ceremony_unfinished", "a change of keys was broken off in the middle").
			WithHint("klatch-forge keys complete with the same file; pending/ has it")
	}
	// At first all keys are on the host that made them; then people take theirs.
	first := state.Role("targets").Version == 0
	done := map[string]bool{}
	for _, t := range p.Targets {
		if !strings.HasSuffix(t.Path, livepatch.BundleSuffix) || state.For(t.Path) != nil {
			continue
		}
		distro, rest, _ := strings.Cut(t.Path, "/")
		arch, _, _ := strings.Cut(rest, "/")
		if done[distro+"/"+arch] {
			continue
		}
		done[distro+"/"+arch] = true
		r, here, err := sign.ReleaseKeys(d, distro, arch)
		if err == nil && !here && (d.Policy.Profile == trust.Lab || first) {
			r, err = sign.MakeReleaseKeys(d, distro, arch)
			here = true
		}
		switch {
		case err != nil:
			return err
		case here:
			p.Roles = append(p.Roles, r)
		case hasRoles(state):
			return fault.New(fault.Invalid, "no_release_role", "no release role may list livepatches for %s/%s", distro, arch).
				WithHint("klatch-forge keys role %s/%s", distro, arch)
		}
	}
	return nil
}

func hasRoles(s tufrepo.State) bool {
	for _, r := range s.Roles {
		if r.Pattern != "" {
			return true
		}
	}
	return false
}
