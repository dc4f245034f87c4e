-- +goose Up
ALTER TABLE tokens ADD COLUMN role TEXT NOT NULL DEFAULT 'machine';

CREATE TABLE mirrors (
	mirror_id    TEXT PRIMARY KEY,
	name         TEXT NOT NULL,
	key_digest   TEXT NOT NULL,
	token_digest TEXT NOT NULL, -- the token it joined with; empty if forgotten
	joined_ms    BIGINT NOT NULL,
	last_seen_ms BIGINT NOT NULL,
	removed_ms   BIGINT NOT NULL -- 0: it may read
);
CREATE INDEX mirrors_token ON mirrors (token_digest, key_digest);

-- +goose Down
DROP TABLE mirrors;
ALTER TABLE tokens DROP COLUMN role;
