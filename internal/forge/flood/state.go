// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"sync"

	"klatch/internal/durable"
	"klatch/internal/forge/build"
)

// State keeps what was found out, so that an interrupted run goes on. It is
// safe for concurrent use.
type State interface {
	// Found returns the result of a plan by its digest.
	Found(digest string) (build.Result, bool)
	// Keep stores a result; it is on disk when Keep returns.
	Keep(digest string, r build.Result) error
}

// found is what the flood needs of a result.
type found struct {
	Result    build.Outcome   `json:"result"`
	Refusals  []build.Refusal `json:"refusals,omitempty"`
	Unchanged []string        `json:"unchanged,omitempty"`
}

// folder keeps one small file for each result: a run makes a few hundred.
type folder struct {
	dir string
	mu  sync.Mutex
}

// StateIn keeps the state in a folder that exists.
func StateIn(dir string) State { return &folder{dir: dir} }

// maxFound limits one stored result, in bytes: a batch may have hundreds of
// refusals with 2 kB of detail each.
const maxFound = 16 << 20

func (s *folder) file(digest string) string { return filepath.Join(s.dir, digest+".json") }

// Found reads a result. One that cannot be read is found out again.
func (s *folder) Found(digest string) (build.Result, bool) {
	b, err := durable.ReadFile(s.file(digest), maxFound)
	if err != nil {
		return build.Result{}, false
	}
	var f found
	if err := json.Unmarshal(b, &f); err != nil || f.Result == "" {
		return build.Result{}, false
	}
	return build.Result{Result: f.Result, Refusals: f.Refusals, Unchanged: f.Unchanged}, true
}

// Keep stores a result.
func (s *folder) Keep(digest string, r build.Result) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := json.Marshal(found{r.Result, r.Refusals, r.Unchanged})
	if err != nil {
		return err
	}
	err = durable.WriteFile(s.file(digest), b, 0o644)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.Join(err, errors.New("the state's folder is gone"))
	}
	return err
}
