// SPDX-License-Identifier: Apache-2.0

// Package scenarios holds the stories that every livepatch goes through in
// the lab, as files: one .txtar each. Their language is told in
// docs/reference/scenarios.md; package player of internal/forge/lab plays them.
package scenarios

import "embed"

// Files are the stories.
//
//go:embed *.txtar
var Files embed.FS
