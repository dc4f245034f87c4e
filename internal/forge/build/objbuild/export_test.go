// SPDX-License-Identifier: Apache-2.0

package objbuild

// ObjtoolNow is for tests that compile by themselves.
var ObjtoolNow = objtoolNow
