-- +goose Up
-- Times are milliseconds since 1970 UTC; documents are JSON text.
CREATE TABLE machines (
	machine_id   TEXT PRIMARY KEY,
	tier         TEXT NOT NULL,
	key_digest   TEXT NOT NULL,
	token_digest TEXT NOT NULL, -- the token it enrolled with; empty if forgotten
	enrolled_ms  BIGINT NOT NULL,
	last_seen_ms BIGINT NOT NULL,
	state_ms     BIGINT NOT NULL,
	state        TEXT NOT NULL,
	facts        TEXT NOT NULL
);
CREATE INDEX machines_token ON machines (token_digest, key_digest);

CREATE TABLE tokens (
	digest     TEXT PRIMARY KEY,
	tier       TEXT NOT NULL,
	created_ms BIGINT NOT NULL,
	expires_ms BIGINT NOT NULL,
	uses       INTEGER NOT NULL,
	used       INTEGER NOT NULL
);

CREATE TABLE reports (
	report_id   INTEGER PRIMARY KEY AUTOINCREMENT,
	machine_id  TEXT NOT NULL,
	report_key  TEXT NOT NULL,
	received_ms BIGINT NOT NULL,
	report      TEXT NOT NULL,
	UNIQUE (machine_id, report_key)
);
CREATE INDEX reports_machine ON reports (machine_id, report_id);

-- +goose Down
DROP TABLE reports;
DROP TABLE tokens;
DROP TABLE machines;
