// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"slices"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
)

// Operator is the form of an operator's repository: the people's top list
// delegates to select, which a server signs, and to promotion, which approvers
// sign. Nothing that the server signs delegates, so whoever owns the server
// cannot say who may promote.
type Operator struct {
	// Approvers is the least threshold of the top list and of promotion: 2
	// wherever one stolen key must not be enough.
	Approvers int
}

const (
	roleSelect    = "select"
	rolePromotion = "promotion"
)

// roles checks the shape: exactly the two roles, each terminating with its one
// pattern, enough people, and no key of a person that is also with the server.
func (o Operator) roles(d *metadata.Delegations, root metadata.RootType) ([]releaseRole, error) {
	bad := func(format string, args ...any) ([]releaseRole, error) {
		return nil, fault.New(fault.Untrusted, codeDelegation, "delegations of the operator's targets: "+format, args...)
	}
	if d == nil || len(d.Roles) != 2 { // hash bins have no Roles
		return bad("not exactly select and promotion")
	}
	// Keys are compared by their value: an id is only a name.
	online, people := map[string]string{}, map[string]string{}
	collect := func(to map[string]string, role string, ids []string, keys map[string]*metadata.Key) {
		for _, id := range ids {
			if k := keys[id]; k != nil {
				to[k.Value.PublicKey] = role
			}
		}
	}
	var out []releaseRole
	for _, r := range d.Roles {
		if r.Name != roleSelect && r.Name != rolePromotion || slices.ContainsFunc(out, func(o releaseRole) bool { return o.name == r.Name }) {
			return bad("role %.80q is none of select and promotion, or there twice", r.Name)
		}
		if !r.Terminating || !slices.Equal(r.Paths, []string{r.Name + "/*/*"}) {
			return bad("role %s is not terminating with the pattern %s/*/*", r.Name, r.Name)
		}
		out = append(out, releaseRole{r.Name, []string{r.Name, "*", "*"}})
		if r.Name == roleSelect {
			collect(online, r.Name, r.KeyIDs, d.Keys)
			continue
		}
		collect(people, r.Name, r.KeyIDs, d.Keys)
		if r.Threshold < o.Approvers { // of different keys: go-tuf knows one under two ids
			return bad("%d keys promote, at least %d must", r.Threshold, o.Approvers)
		}
	}
	for _, role := range []string{metadata.ROOT, metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP} {
		r := root.Roles[role] // all four are there, or go-tuf takes no root
		to := online
		if role == metadata.ROOT || role == metadata.TARGETS {
			if to = people; r.Threshold < o.Approvers {
				return bad("%d keys sign %s, at least %d must", r.Threshold, role, o.Approvers)
			}
		}
		collect(to, role, r.KeyIDs, root.Keys)
	}
	for value, role := range people {
		if with := online[value]; with != "" {
			return bad("one key is of %s, for people, and of %s, on the server", role, with)
		}
	}
	return out, nil
}

// ofOperator says whose repository it was, and who can help.
func ofOperator(err error) error {
	hint := fault.HintOf(err)
	switch fault.CodeOf(err) {
	case codeExpired:
		hint = "is klatch-server running? It signs again by itself; what people sign: klatch-server rollout status. Or this machine's clock is wrong"
	case codeUntrusted, codeDelegation:
		hint = "check that the rollout anchor and the server's address belong to the same operator"
	case codeJump:
		hint = "whoever holds the server's keys signed this; the operator must replace them: docs/howto/tiers-and-promotion.md"
	}
	return fault.New(fault.KindOf(err), fault.CodeOf(err), "operator's repository: %w", err).WithHint("%s", hint)
}
