"""The SQL schema of task pools and its migrations."""

from __future__ import annotations

COLUMNS = (
    "id, pool, hash, status, origin, priority, attempt, committed, errors, lost, preemptions, "
    "deadline, created, updated, claim, worker, run, progress, error, traceback, res, definition"
)

# The statements that migrate from each version to the next.
MIGRATIONS: dict[int, tuple[str, ...]] = {}

TABLE = """
CREATE TABLE IF NOT EXISTS {tasks} (
    id {id}, pool TEXT NOT NULL, hash TEXT NOT NULL, status TEXT NOT NULL, origin TEXT,
    priority BIGINT NOT NULL DEFAULT 0, attempt BIGINT NOT NULL DEFAULT 0, committed BIGINT,
    errors BIGINT NOT NULL DEFAULT 0, lost BIGINT NOT NULL DEFAULT 0,
    preemptions BIGINT NOT NULL DEFAULT 0, deadline {time}, created {time}, updated {time},
    claim TEXT, worker TEXT, run TEXT, progress TEXT, error TEXT, traceback TEXT, res TEXT,
    definition TEXT NOT NULL, tokens TEXT NOT NULL,
    UNIQUE (pool, hash))
"""
INDEX = "CREATE INDEX IF NOT EXISTS {tasks}_by_turn ON {tasks} (pool, status, priority DESC, id)"
