// SPDX-License-Identifier: Apache-2.0

package sqlstore_test

import (
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/server/store"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/server/store/storetest"
)

func open(t *testing.T, path string) *sqlstore.DB {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		return open(t, filepath.Join(t.TempDir(), "klatch ?#% test.db"))
	})
}

func TestOpenAgainKeepsWhatWasWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "klatch.db")
	first := open(t, path)
	now := time.Now()
	if err := first.Seen(t.Context(), store.Sighting{MachineID: storetest.MachineID(1), Tier: "stable", Seen: now, Facts: storetest.Facts("h")}); err != nil {
		t.Fatal(err)
	}
	// A second process, before the first one has closed: as after kill -9.
	second := open(t, path)
	if m, err := second.Machine(t.Context(), storetest.MachineID(1)); err != nil || m.Facts.Hostname != "h" {
		t.Errorf("machine %+v, %v", m, err)
	}
	if v, err := second.Version(t.Context()); err != nil || v < 3 {
		t.Errorf("version %d, %v", v, err)
	}
}

func TestOpenRefusesANewerDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "klatch.db")
	db := open(t, path)
	if err := db.Pretend(t.Context(), 999); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlstore.Open(t.Context(), path); fault.CodeOf(err) != "database_newer" {
		t.Errorf("open: %v", err)
	}
}
