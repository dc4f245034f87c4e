// SPDX-License-Identifier: Apache-2.0

// Package sqlstore keeps the server's memory in SQLite through database/sql.
// Queries use the part of SQL that SQLite and PostgreSQL share; migrations are
// per dialect. Only cmd may import it. Start with Open.
package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"time"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite" // driver "sqlite"

	"klatch/internal/fault"
	"klatch/internal/server/store"
	"klatch/internal/wire"
)

//go:embed migrations/sqlite/*.sql
var migrations embed.FS

// DB is a store.Store in one SQLite file.
type DB struct{ db *sql.DB }

var _ store.Store = (*DB)(nil)

// Open opens or makes the database and brings its tables up to date.
func Open(ctx context.Context, path string) (*DB, error) {
	// WAL with synchronous=FULL syncs each commit (sqlite.org/pragma.html);
	// _txlock=immediate takes the write lock at the start, so that a
	// transaction waits for its turn instead of failing half-way.
	q := url.Values{
		"_pragma": {"journal_mode(WAL)", "synchronous(FULL)", "busy_timeout(10000)", "foreign_keys(ON)"},
		"_txlock": {"immediate"},
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}).String())
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	db.SetMaxOpenConns(8)
	if err := migrate(ctx, db); err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", path, err), db.Close())
	}
	return &DB{db}, nil
}

func migrate(ctx context.Context, db *sql.DB) error {
	files, err := fs.Sub(migrations, "migrations/sqlite")
	if err != nil {
		return err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, files, goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return err
	}
	current, target, err := p.GetVersions(ctx)
	if err != nil {
		return err
	}
	if current > target {
		return fault.New(fault.Conflict, "database_newer", "its tables are of version %d, this program knows %d", current, target).
			WithHint("run the klatch-server that made it, or a newer one")
	}
	_, err = p.Up(ctx)
	return err
}

// Close ends all use.
func (d *DB) Close() error { return d.db.Close() }

// Version is the number of the newest migration in the database.
func (d *DB) Version(ctx context.Context) (v int64, err error) {
	err = d.db.QueryRowContext(ctx, `SELECT MAX(version_id) FROM goose_db_version WHERE is_applied`).Scan(&v)
	return v, err
}

// inTx runs f in a transaction; it commits unless f fails.
func (d *DB) inTx(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	return tx.Commit()
}

func ms(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

func fromMS(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.UnixMilli(n).UTC()
}

// A sighting of an unknown machine adds it. The state of a known one is only
// replaced by a later one, because queued reports arrive late.
const seen = `
INSERT INTO machines (machine_id, tier, key_digest, token_digest, enrolled_ms, last_seen_ms, state_ms, state, facts)
VALUES ($1, $2, '', '', $3, $3, $4, $5, $6)
ON CONFLICT (machine_id) DO UPDATE SET
	last_seen_ms = CASE WHEN excluded.last_seen_ms > machines.last_seen_ms THEN excluded.last_seen_ms ELSE machines.last_seen_ms END,
	state    = CASE WHEN excluded.state_ms >= machines.state_ms THEN excluded.state    ELSE machines.state    END,
	facts    = CASE WHEN excluded.state_ms >= machines.state_ms THEN excluded.facts    ELSE machines.facts    END,
	state_ms = CASE WHEN excluded.state_ms >= machines.state_ms THEN excluded.state_ms ELSE machines.state_ms END`

// execer is what a connection and a transaction have in common.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

func see(ctx context.Context, x execer, s store.Sighting) error {
	state, err := json.Marshal(s.State)
	if err != nil {
		return err
	}
	facts := []byte{} // a machine that said nothing has none
	if s.Facts != (wire.Facts{}) {
		if facts, err = json.Marshal(s.Facts); err != nil {
			return err
		}
	}
	_, err = x.ExecContext(ctx, seen, s.MachineID, s.Tier, ms(s.Seen), ms(s.StateAt), string(state), string(facts))
	return err
}

// Seen notes a contact.
func (d *DB) Seen(ctx context.Context, s store.Sighting) error {
	if err := see(ctx, d.db, s); err != nil {
		return fmt.Errorf("store sighting of %s: %w", s.MachineID, err)
	}
	return nil
}

const machineColumns = `machine_id, tier, key_digest, enrolled_ms, last_seen_ms, state_ms, state, facts`

func scanMachine(row interface{ Scan(...any) error }) (store.Machine, error) {
	var m store.Machine
	var enrolled, last, at int64
	var state, facts string
	if err := row.Scan(&m.ID, &m.Tier, &m.KeyDigest, &enrolled, &last, &at, &state, &facts); err != nil {
		return m, err
	}
	m.Enrolled, m.LastSeen, m.StateAt = fromMS(enrolled), fromMS(last), fromMS(at)
	if err := json.Unmarshal([]byte(state), &m.State); err != nil {
		return m, fmt.Errorf("state of %s: %w", m.ID, err)
	}
	if facts == "" {
		return m, nil
	}
	if err := json.Unmarshal([]byte(facts), &m.Facts); err != nil {
		return m, fmt.Errorf("facts of %s: %w", m.ID, err)
	}
	return m, nil
}

// Machine finds one.
func (d *DB) Machine(ctx context.Context, id string) (store.Machine, error) {
	m, err := scanMachine(d.db.QueryRowContext(ctx, `SELECT `+machineColumns+` FROM machines WHERE machine_id = $1`, id))
	if errors.Is(err, sql.ErrNoRows) {
		return m, fault.New(fault.NotFound, "machine_unknown", "machine %.60q is not known", id)
	}
	return m, err
}

// Machines lists by id.
func (d *DB) Machines(ctx context.Context, after string, limit int) (list []store.Machine, err error) {
	rows, err := d.db.QueryContext(ctx, `SELECT `+machineColumns+` FROM machines WHERE machine_id > $1 ORDER BY machine_id LIMIT $2`, after, store.Clamp(limit))
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		m, err := scanMachine(rows)
		if err != nil {
			return nil, fmt.Errorf("list machines: %w", err)
		}
		list = append(list, m)
	}
	return list, rows.Err()
}

// AddToken stores a token.
func (d *DB) AddToken(ctx context.Context, t store.Token) error {
	_, err := d.db.ExecContext(ctx, `INSERT INTO tokens (digest, role, tier, created_ms, expires_ms, uses, used) VALUES ($1, $2, $3, $4, $5, $6, $7)`,
		t.Digest, cmp.Or(t.Role, store.ForMachine), t.Tier, ms(t.Created), ms(t.Expires), t.Uses, t.Used)
	if e, ok := errors.AsType[*sqlite.Error](err); ok && e.Code() == 1555 { // SQLITE_CONSTRAINT_PRIMARYKEY
		return fault.New(fault.Conflict, "token_exists", "token exists already")
	}
	return err
}

// Tokens lists those that are not expired.
func (d *DB) Tokens(ctx context.Context, now time.Time) (list []store.Token, err error) {
	rows, err := d.db.QueryContext(ctx, `SELECT digest, role, tier, created_ms, expires_ms, uses, used FROM tokens WHERE expires_ms > $1 ORDER BY created_ms DESC, digest LIMIT $2`, ms(now), store.MaxPage)
	if err != nil {
		return nil, fmt.Errorf("list tokens: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var t store.Token
		var created, expires int64
		if err := rows.Scan(&t.Digest, &t.Role, &t.Tier, &created, &expires, &t.Uses, &t.Used); err != nil {
			return nil, fmt.Errorf("list tokens: %w", err)
		}
		t.Created, t.Expires = fromMS(created), fromMS(expires)
		list = append(list, t)
	}
	return list, rows.Err()
}

// AddReport stores a report once.
func (d *DB) AddReport(ctx context.Context, s store.Sighting, r wire.Report) (fresh bool, err error) {
	b, err := json.Marshal(r)
	if err != nil {
		return false, err
	}
	err = d.inTx(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, `INSERT INTO reports (machine_id, report_key, received_ms, report) VALUES ($1, $2, $3, $4) ON CONFLICT (machine_id, report_key) DO NOTHING`,
			s.MachineID, r.Key, ms(s.Seen), string(b))
		if err != nil {
			return err
		}
		n, err := res.RowsAffected()
		if err != nil {
			return err
		}
		if fresh = n == 1; !fresh {
			s.StateAt = time.UnixMilli(-1) // before any state: only the contact counts
		} else if _, err := tx.ExecContext(ctx, `DELETE FROM reports WHERE machine_id = $1 AND report_id <= (
			SELECT report_id FROM reports WHERE machine_id = $1 ORDER BY report_id DESC LIMIT 1 OFFSET $2)`, s.MachineID, store.MaxReports); err != nil {
			return err
		}
		return see(ctx, tx, s)
	})
	if err != nil {
		return false, fmt.Errorf("store report of %s: %w", s.MachineID, err)
	}
	return fresh, nil
}

// Reports lists newest first.
func (d *DB) Reports(ctx context.Context, machineID string, before int64, limit int) (list []store.StoredReport, err error) {
	if before <= 0 {
		before = 1<<63 - 1
	}
	query, args := `SELECT report_id, machine_id, received_ms, report FROM reports WHERE report_id < $1 ORDER BY report_id DESC LIMIT $2`, []any{before, store.Clamp(limit)}
	if machineID != "" {
		query, args = `SELECT report_id, machine_id, received_ms, report FROM reports WHERE report_id < $1 AND machine_id = $3 ORDER BY report_id DESC LIMIT $2`, append(args, machineID)
	}
	rows, err := d.db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("list reports: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var s store.StoredReport
		var received int64
		var text string
		if err := rows.Scan(&s.ID, &s.MachineID, &received, &text); err != nil {
			return nil, fmt.Errorf("list reports: %w", err)
		}
		s.Received = fromMS(received)
		if err := json.Unmarshal([]byte(text), &s.Report); err != nil {
			return nil, fmt.Errorf("report %d: %w", s.ID, err)
		}
		list = append(list, s)
	}
	return list, rows.Err()
}
