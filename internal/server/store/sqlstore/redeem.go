// SPDX-License-Identifier: Apache-2.0

package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"klatch/internal/fault"
	"klatch/internal/server/store"
)

// use takes one use of a token, if it is good for this role at this time. again
// finds who redeemed it before with the same key, and says so.
func use(ctx context.Context, tx *sql.Tx, digest string, role store.Role, at time.Time, again func() (bool, error)) (tier string, known bool, err error) {
	var is store.Role
	var expires int64
	var uses, used int
	err = tx.QueryRowContext(ctx, `SELECT role, tier, expires_ms, uses, used FROM tokens WHERE digest = $1`, digest).Scan(&is, &tier, &expires, &uses, &used)
	hint := "make another one: klatch-fleet token create"
	if role == store.ForMirror {
		hint = "make another one on the server above: klatch-server token create --mirror"
	}
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", false, fault.New(fault.Denied, "token_unknown", "enrollment token is not known here").WithHint("%s", hint)
	case err != nil:
		return "", false, err
	case is != role:
		return "", false, fault.New(fault.Denied, "token_role", "token is for a %s, not for a %s", is, role).WithHint("%s", hint)
	case ms(at) >= expires:
		return "", false, fault.New(fault.Denied, "token_expired", "enrollment token expired at %s", fromMS(expires).Format(time.RFC3339)).WithHint("%s", hint)
	}
	if known, err = again(); known || err != nil {
		return tier, known, err
	}
	if used >= uses {
		return "", false, fault.New(fault.Denied, "token_used", "enrollment token was used by %d of %d %ss already", used, uses, role).WithHint("%s", hint)
	}
	_, err = tx.ExecContext(ctx, `UPDATE tokens SET used = used + 1 WHERE digest = $1`, digest)
	return tier, false, err
}

// Redeem uses a token for a machine.
func (d *DB) Redeem(ctx context.Context, digest string, m store.Machine) (store.Machine, error) {
	err := d.inTx(ctx, func(tx *sql.Tx) error {
		tier, known, err := use(ctx, tx, digest, store.ForMachine, m.Enrolled, func() (bool, error) {
			old, err := scanMachine(tx.QueryRowContext(ctx, `SELECT `+machineColumns+` FROM machines WHERE token_digest = $1 AND key_digest = $2`, digest, m.KeyDigest))
			if errors.Is(err, sql.ErrNoRows) {
				return false, nil
			}
			if err == nil {
				m = old
			}
			return err == nil, err
		})
		if known || err != nil {
			return err
		}
		m.Tier = tier
		if err := see(ctx, tx, store.Sighting{MachineID: m.ID, Tier: m.Tier, Seen: m.Enrolled, State: m.State, Facts: m.Facts}); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `UPDATE machines SET key_digest = $1, token_digest = $2 WHERE machine_id = $3`, m.KeyDigest, digest, m.ID)
		return err
	})
	return m, err
}

const mirrorColumns = `mirror_id, name, key_digest, joined_ms, last_seen_ms, removed_ms`

func scanMirror(row interface{ Scan(...any) error }) (store.Mirror, error) {
	var m store.Mirror
	var joined, last, removed int64
	err := row.Scan(&m.ID, &m.Name, &m.KeyDigest, &joined, &last, &removed)
	m.Joined, m.LastSeen, m.Removed = fromMS(joined), fromMS(last), fromMS(removed)
	return m, err
}

// RedeemMirror uses a token for a mirror.
func (d *DB) RedeemMirror(ctx context.Context, digest string, m store.Mirror) (store.Mirror, error) {
	err := d.inTx(ctx, func(tx *sql.Tx) error {
		_, known, err := use(ctx, tx, digest, store.ForMirror, m.Joined, func() (bool, error) {
			old, err := scanMirror(tx.QueryRowContext(ctx, `SELECT `+mirrorColumns+` FROM mirrors WHERE token_digest = $1 AND key_digest = $2 AND removed_ms = 0`, digest, m.KeyDigest))
			if errors.Is(err, sql.ErrNoRows) {
				return false, nil
			}
			if err == nil {
				m = old
			}
			return err == nil, err
		})
		if known || err != nil {
			return err
		}
		m.LastSeen = m.Joined
		_, err = tx.ExecContext(ctx, `INSERT INTO mirrors (mirror_id, name, key_digest, token_digest, joined_ms, last_seen_ms, removed_ms) VALUES ($1, $2, $3, $4, $5, $5, 0)`,
			m.ID, m.Name, m.KeyDigest, digest, ms(m.Joined))
		return err
	})
	return m, err
}

// MirrorSeen notes a contact.
func (d *DB) MirrorSeen(ctx context.Context, id string, at time.Time) error {
	var removed int64
	err := d.db.QueryRowContext(ctx, `INSERT INTO mirrors (mirror_id, name, key_digest, token_digest, joined_ms, last_seen_ms, removed_ms) VALUES ($1, '', '', '', $2, $2, 0)
		ON CONFLICT (mirror_id) DO UPDATE SET last_seen_ms = CASE WHEN mirrors.removed_ms = 0 AND excluded.last_seen_ms > mirrors.last_seen_ms THEN excluded.last_seen_ms ELSE mirrors.last_seen_ms END
		RETURNING removed_ms`, id, ms(at)).Scan(&removed)
	if err != nil {
		return fmt.Errorf("note mirror %s: %w", id, err)
	}
	if removed != 0 {
		return fault.New(fault.Denied, "mirror_removed", "mirror %s was removed at %s", id, fromMS(removed).Format(time.RFC3339)).
			WithHint("ask whoever runs the server above for a fresh token: klatch-server join")
	}
	return nil
}

// Mirrors lists by id.
func (d *DB) Mirrors(ctx context.Context) (list []store.Mirror, err error) {
	rows, err := d.db.QueryContext(ctx, `SELECT `+mirrorColumns+` FROM mirrors ORDER BY mirror_id LIMIT $1`, store.MaxPage)
	if err != nil {
		return nil, fmt.Errorf("list mirrors: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		m, err := scanMirror(rows)
		if err != nil {
			return nil, fmt.Errorf("list mirrors: %w", err)
		}
		list = append(list, m)
	}
	return list, rows.Err()
}

// RemoveMirror shuts one out. Removing it again keeps the first time.
func (d *DB) RemoveMirror(ctx context.Context, id string, at time.Time) error {
	res, err := d.db.ExecContext(ctx, `UPDATE mirrors SET removed_ms = CASE WHEN removed_ms = 0 THEN $1 ELSE removed_ms END WHERE mirror_id = $2`, ms(at), id)
	if err != nil {
		return fmt.Errorf("remove mirror: %w", err)
	}
	n, err := res.RowsAffected()
	if err == nil && n == 0 {
		err = fault.New(fault.NotFound, "mirror_unknown", "mirror %.60q is not known", id).WithHint("list them: klatch-server mirrors")
	}
	return err
}
