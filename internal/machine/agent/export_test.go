// SPDX-License-Identifier: Apache-2.0

package agent

import "slices"

// Without takes a step out of the order before Run, for tests that show what
// it is for. The first entry says who the machine is and stays.
func (a *Agent) Without(s Step) {
	rest := slices.DeleteFunc(slices.Clone(a.order[1:]), func(c check) bool { return c.step == s })
	a.order = append(a.order[:1:1], rest...)
}
