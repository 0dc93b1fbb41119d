"""Pools on SQLite (one machine) and PostgreSQL (many).

Both run the same statements, each of them atomic by itself: SQLite takes its write lock for the
length of one, PostgreSQL claims with FOR UPDATE SKIP LOCKED, so that workers never wait for each
other. SQLite keeps its log with synchronous=NORMAL: a killed process loses nothing, a power cut
may lose the last commits, whose tasks then run again. Its locks do not work over NFS; use
PostgreSQL there.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, Connection, Engine, make_url

from qtorch.core.errors import TaskStoreError, TaskStoreVersionError
from qtorch.task.definition import Definition
from qtorch.task.query import RUNNING, WAITING, Condition
from qtorch.task.store import SCHEMA, SCHEMA_VERSION, TASKS, Change, Row, Store, StoreAway
from qtorch.task.tables import COLUMNS, INDEX, MIGRATIONS, TABLE

BUSY_SECONDS = 5.0
CONNECT_SECONDS = 10
LOCK_KEY = 716_726_384  # of PostgreSQL's advisory locks
# PostgreSQL's states that pass: connection lost, shutting down, too many clients, deadlock.
PASSING_STATES = ("08", "40", "53", "55", "57")
PASSING_WORDS = ("locked", "busy", "disk is full", "disk I/O error")  # of SQLite
REFUSED = re.compile(r"authentication|does not exist|no pg_hba|role .* not|permission", re.I)


class SqlStore(Store):
    """Tasks in one table of a database that SQLAlchemy reaches."""

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self.lite = self.url.get_backend_name() == "sqlite"
        self._now = ":now" if self.lite else "CAST(extract(epoch FROM clock_timestamp()) AS FLOAT8)"
        self._skip = "" if self.lite else "FOR UPDATE SKIP LOCKED"
        self._engine = self._connected()
        self._prepare()

    def insert(self, pool: str, definitions: Sequence[Definition]) -> int:
        statement = (
            f"INSERT INTO {TASKS} (pool, hash, status, created, updated, definition, tokens) "
            f"VALUES (:pool, :hash, :status, {self._now}, {self._now}, :definition, :tokens) "
            "ON CONFLICT (pool, hash) DO NOTHING"
        )
        rows = [
            {"pool": pool, "status": WAITING, "hash": d.hash, **_stored(d), **self._clock()}
            for d in definitions
        ]
        added = 0
        with self._transaction() as connection:
            if not self.lite:  # two storms at once would wait for each other's rows
                lock = f"SELECT pg_advisory_xact_lock({LOCK_KEY}, hashtext(:pool))"
                connection.exec_driver_sql(self._native(lock), {"pool": pool})
            for row in rows:
                added += connection.exec_driver_sql(self._native(statement), row).rowcount
        return added

    def ids(self, pool: str, hashes: Sequence[str]) -> dict[str, str]:
        where, given = self._where(pool, Condition(hashes=tuple(hashes)))
        rows = self._rows(f"SELECT id, hash FROM {TASKS} WHERE {where}", given)
        return {row["hash"]: str(row["id"]) for row in rows}

    def claim(self, pool: str, status: str, condition: Condition, change: Change) -> Row | None:
        where, given = self._where(pool, condition)
        sets, values = self._sets(change)
        rows = self._rows(
            f"UPDATE {TASKS} SET {sets} WHERE id = (SELECT id FROM {TASKS} WHERE {where} "
            f"AND status = :turn ORDER BY priority DESC, id LIMIT 1 {self._skip}) "
            f"RETURNING {COLUMNS}",
            {**given, **values, "turn": status},
        )
        return rows[0] if rows else None

    def claimed(self, pool: str, claim: str) -> Row | None:
        rows = self._rows(
            f"SELECT {COLUMNS} FROM {TASKS} WHERE pool = :pool AND status = '{RUNNING}' "
            "AND claim = :claim",
            {"pool": pool, "claim": claim},
        )
        return rows[0] if rows else None

    def expired(self, pool: str) -> list[Row]:
        return self._rows(
            f"SELECT {COLUMNS} FROM {TASKS} WHERE pool = :pool AND status = '{RUNNING}' "
            f"AND deadline < {self._now} ORDER BY id",
            {"pool": pool, **self._clock()},
        )

    def change(self, id: str, attempt: int, change: Change, *, expired: bool = False) -> bool:
        sets, values = self._sets(change)
        where = f"id = :which AND attempt = :fence AND status = '{RUNNING}'"
        if expired:
            where += f" AND deadline < {self._now}"
        given = {"which": _number(id), "fence": attempt, **self._clock(), **values}
        return self._changed(f"UPDATE {TASKS} SET {sets} WHERE {where}", given) == 1

    def change_all(self, pool: str, condition: Condition, change: Change) -> int:
        where, given = self._where(pool, condition)
        sets, values = self._sets(change)
        return self._changed(f"UPDATE {TASKS} SET {sets} WHERE {where}", {**given, **values})

    def redefine(self, id: str, definition: Definition, change: Change) -> bool:
        sets, values = self._sets(
            Change({**change.values, "hash": definition.hash, **_stored(definition)})
        )
        try:
            return bool(
                self._changed(
                    f"UPDATE {TASKS} SET {sets} WHERE id = :which", {**values, "which": _number(id)}
                )
            )
        except exc.IntegrityError as error:
            raise ValueError("the pool holds this definition already") from error

    def find(self, pool: str, condition: Condition) -> list[Row]:
        where, given = self._where(pool, condition)
        return self._rows(f"SELECT {COLUMNS} FROM {TASKS} WHERE {where} ORDER BY id", given)

    def count(self, pool: str, condition: Condition) -> dict[str, int]:
        where, given = self._where(pool, condition)
        rows = self._rows(
            f"SELECT status, count(*) AS n FROM {TASKS} WHERE {where} GROUP BY status", given
        )
        return {row["status"]: int(row["n"]) for row in rows}

    def delete(self, pool: str, condition: Condition) -> int:
        where, given = self._where(pool, condition)
        return self._changed(f"DELETE FROM {TASKS} WHERE {where}", given)

    def pools(self) -> list[str]:
        return [r["pool"] for r in self._rows(f"SELECT DISTINCT pool FROM {TASKS} ORDER BY 1", {})]

    def close(self) -> None:
        self._engine.dispose()

    # Statements

    def _clock(self) -> dict[str, float]:
        return {"now": time.time()} if self.lite else {}

    def _sets(self, change: Change) -> tuple[str, dict[str, Any]]:
        parts = [f"updated = {self._now}"]
        given: dict[str, Any] = self._clock()
        for name, value in change.values.items():
            parts.append(f"{name} = :set_{name}")
            given[f"set_{name}"] = value.replace("\0", "") if isinstance(value, str) else value
        for name, step in change.steps.items():
            parts.append(f"{name} = {name} + :add_{name}")
            given[f"add_{name}"] = step
        if change.lease is not None:
            parts.append(f"deadline = {self._now} + :lease")
            given["lease"] = float(change.lease)
        elif "status" in change.values:
            parts.append("deadline = NULL")
        return ", ".join(parts), given

    def _where(self, pool: str, condition: Condition) -> tuple[str, dict[str, Any]]:
        parts = ["pool = :pool"]
        given: dict[str, Any] = {"pool": pool}
        listed: dict[str, Sequence[Any] | None] = {
            "id": None if condition.ids is None else [_number(i) for i in condition.ids],
            "status": condition.statuses,
            "hash": condition.hashes,
        }
        for name, values in listed.items():
            if values is not None:
                parts.append(self._among(name, f"in_{name}"))
                given[f"in_{name}"] = json.dumps(list(values)) if self.lite else list(values)
        position = "instr" if self.lite else "strpos"
        for k, group in enumerate(condition.tokens):
            names = [f"token_{k}_{j}" for j in range(len(group))]
            given.update(zip(names, group, strict=True))
            found = [f"{position}(tokens, :{n}) > 0" for n in names]
            parts.append(f"({' OR '.join(found)})" if found else "1 = 0")
        return " AND ".join(parts), given

    def _among(self, column: str, name: str) -> str:
        if self.lite:
            return f"{column} IN (SELECT value FROM json_each(:{name}))"
        return f"{column} = ANY(CAST(:{name} AS {'BIGINT' if column == 'id' else 'TEXT'}[]))"

    def _rows(self, statement: str, given: Mapping[str, Any]) -> list[Row]:
        with self._sent(statement, given) as cursor:
            names = [column[0] for column in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        return [{**row, "id": str(row["id"])} if "id" in row else row for row in rows]

    def _changed(self, statement: str, given: Mapping[str, Any]) -> int:
        with self._sent(statement, given) as cursor:
            return int(cursor.rowcount)

    @contextmanager
    def _sent(self, statement: str, given: Mapping[str, Any]) -> Iterator[Any]:
        """The driver's own cursor after a statement: SQLAlchemy's costs more than a claim does."""
        dialect, driver = self._engine.dialect, self._engine.dialect.loaded_dbapi
        connection = cursor = None
        with self._answering():
            try:
                connection = self._engine.raw_connection()
                cursor = connection.cursor()
                cursor.execute(self._native(statement), dict(given))
                yield cursor
            except driver.Error as error:
                link = connection and connection.driver_connection
                gone = bool(link and dialect.is_disconnect(error, link, cursor))
                if connection and gone:
                    connection.invalidate(error)
                raise exc.DBAPIError.instance(
                    statement, None, error, driver.Error,
                    connection_invalidated=gone, dialect=dialect,
                ) from error  # fmt: skip
            finally:
                if connection:
                    connection.close()

    def _native(self, statement: str) -> str:
        """A statement with `:name` parameters, in the driver's own form."""
        return statement if self.lite else _percent(statement)

    # The connection

    def _connected(self) -> Engine:
        """Connections that commit each statement by itself."""
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "pool_size": 3}
        if not self.lite:
            options["connect_args"] = {"connect_timeout": CONNECT_SECONDS, "keepalives_idle": 30}
            return _engine(self.url, options)
        folder = Path(str(self.url.database)).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TaskStoreError(f"there is no folder {folder} for the pool: {error}") from error
        options["connect_args"] = {"timeout": BUSY_SECONDS}
        engine = _engine(self.url, options)

        @sa.event.listens_for(engine, "connect")
        def set_up(connection: Any, record: Any) -> None:
            connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")

        return engine

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._answering(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if self.lite else "BEGIN")
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                if not connection.invalidated:
                    connection.exec_driver_sql("ROLLBACK")
                raise

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Tells errors that pass (StoreAway) from those that do not (TaskStoreError)."""
        try:
            yield
        except exc.IntegrityError:
            raise
        except (exc.OperationalError, exc.InterfaceError, exc.InternalError) as error:
            if self._passes(error):
                raise StoreAway(" ".join(str(error.orig).split())[:200]) from error
            raise TaskStoreError(
                f"the task store {self.url.render_as_string()} refused: "
                f"{' '.join(str(error.orig).split())}"
            ) from error
        except exc.TimeoutError as error:  # of the pool of connections
            raise StoreAway(str(error)) from error

    def _passes(self, error: exc.DBAPIError) -> bool:
        text = str(error.orig)
        if self.lite:
            return any(word in text for word in PASSING_WORDS)
        state = getattr(error.orig, "sqlstate", None)
        if state:
            return str(state).startswith(PASSING_STATES)
        return error.connection_invalidated or not REFUSED.search(text)

    # The tables

    def _prepare(self) -> None:
        """Make the tables, or bring those of an older version up to date."""
        with self._answering():
            version = self._version()
        if version is None or version < SCHEMA_VERSION:
            with self._transaction() as connection:
                if not self.lite:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY}, 0)")
                self._migrate(connection)
        elif version > SCHEMA_VERSION:
            raise TaskStoreVersionError(
                f"the task store {self.url.render_as_string()} has version {version} of the "
                f"tables, this qtorch knows up to {SCHEMA_VERSION}. Update qtorch here, or use "
                "another store."
            )

    def _version(self, connection: Connection | None = None) -> int | None:
        if connection is None:
            with self._engine.connect() as own:
                return self._version(own)
        there = (
            f"SELECT name FROM sqlite_master WHERE type = 'table' AND name = '{SCHEMA}'"
            if self.lite
            # Not to_regclass: its answer may be an older one, from before the lock was waited for.
            else "SELECT tablename FROM pg_tables "
            f"WHERE tablename = '{SCHEMA}' AND schemaname = ANY(current_schemas(false))"
        )
        if connection.exec_driver_sql(there).scalar() is None:
            return None
        found = connection.exec_driver_sql(f"SELECT max(version) FROM {SCHEMA}").scalar()
        return None if found is None else int(found)

    def _migrate(self, connection: Connection) -> None:
        version = self._version(connection)
        kinds = {
            "tasks": TASKS,
            "id": "INTEGER PRIMARY KEY AUTOINCREMENT"
            if self.lite
            else "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
            "time": "REAL" if self.lite else "FLOAT8",
        }
        if version is None:
            statements = [TABLE, INDEX, f"CREATE TABLE {SCHEMA} (version BIGINT NOT NULL)"]
        else:
            statements = [s for v in range(version, SCHEMA_VERSION) for s in MIGRATIONS[v]]
        if version != SCHEMA_VERSION:  # else another process was quicker
            statements.append(f"INSERT INTO {SCHEMA} (version) VALUES ({SCHEMA_VERSION})")
        for statement in statements:
            connection.exec_driver_sql(statement.format(**kinds))


@functools.lru_cache(maxsize=256)
def _percent(statement: str) -> str:
    """`:name` as psycopg writes it."""
    return re.sub(r":(\w+)", r"%(\1)s", statement)


def _engine(url: URL, options: dict[str, Any]) -> Engine:
    try:
        return sa.create_engine(url, **options)
    except ModuleNotFoundError as error:
        raise TaskStoreError(
            f"a pool on {url.get_backend_name()} needs {error.name}: pip install "
            "'qtorch[postgres]'."
        ) from error


def _checked(text: str) -> URL:
    try:
        url = make_url(text)
    except exc.ArgumentError as error:
        raise TaskStoreError(f"{text!r} is no URL of a database: {error}") from error
    if url.get_backend_name() == "postgres" or url.drivername == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise TaskStoreError(
                f"{text!r} is a database in memory, which other processes cannot reach; give a "
                "file: sqlite:///path/of/tasks.db."
            )
        return url.set(database=str(Path(str(url.database)).expanduser().absolute()))
    return url


def _stored(definition: Definition) -> dict[str, str]:
    return {"definition": definition.text, "tokens": " ".join(definition.tokens)}


def _number(id: str) -> int:
    """A task's id as the database has it; one of another form matches no row."""
    return int(id) if id.isascii() and id.isdigit() and len(id) < 19 else -1
