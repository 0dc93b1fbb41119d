"""Task pools on SQLite (one machine) and PostgreSQL (many machines).

Both run the same statements, each atomic by itself. SQLite holds its write lock during one
statement; PostgreSQL claims with FOR UPDATE SKIP LOCKED, so that workers never wait for each
other. SQLite runs with synchronous=NORMAL: a killed process loses nothing, a power failure may
lose the last commits, whose tasks then run again. SQLite's locks do not work over NFS; use
PostgreSQL there.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, Connection, Engine, make_url

from qtorch.core.errors import TaskStoreError, install_command
from qtorch.core.secrets import check_encoding, redact_urls
from qtorch.core.session import resolve_path
from qtorch.process.lease import boot_id
from qtorch.task.definition import Definition
from qtorch.task.stores.base import (
    MAX_COUNT,
    MAX_LEASE_SECONDS,
    RUNNING,
    SCHEMA,
    SCHEMA_VERSION,
    TASKS,
    WAITING,
    Change,
    Condition,
    Row,
    Store,
    StoreFileLost,
    StoreUnavailable,
    is_current_version,
    other_statuses,
    sum_counts,
)

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

CLOCKS = "qtorch_task_clocks"  # a table of SQLite stores only
CLOCK_TOLERANCE = 60.0  # seconds
BUSY_SECONDS = 5.0
CONNECT_SECONDS = 10
LOCK_KEY = 716_726_384  # for PostgreSQL's advisory locks
# PostgreSQL error states that may pass: connection lost, shutdown, too many clients, deadlock.
TRANSIENT_STATES = ("08", "40", "53", "55", "57")
TRANSIENT_MESSAGES = ("locked", "busy", "disk is full", "disk I/O error")  # of SQLite
PERMANENT_MESSAGES = re.compile(
    r"authentication|does not exist|no pg_hba|role .* not|permission", re.I
)


class SqlStore(Store):
    """Stores tasks in one table of an SQL database."""

    def __init__(self, url: str) -> None:
        self.url = _parse_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        server_time = "CAST(extract(epoch FROM clock_timestamp()) AS FLOAT8)"
        self._now = ":now" if self.is_sqlite else server_time
        self._clock = ":clock" if self.is_sqlite else server_time  # of deadlines
        self._is_expired = (
            f"(deadline BETWEEN {self._clock} AND {self._clock} + {MAX_LEASE_SECONDS}) IS NOT TRUE"
        )
        self._skip_locked = "" if self.is_sqlite else "FOR UPDATE SKIP LOCKED"
        self._file_identity: tuple[int, int] | None = None  # of SQLite's file, once it is open
        self._engine = self._create_engine()
        self._prepare()
        self._clock_start = self._load_clock_start() if self.is_sqlite else 0.0

    def insert(self, pool: str, definitions: Sequence[Definition]) -> int:
        statement = (
            f"INSERT INTO {TASKS} (pool, hash, status, created, updated, definition, tokens) "
            f"VALUES (:pool, :hash, :status, {self._now}, {self._now}, :definition, :tokens) "
            "ON CONFLICT (pool, hash) DO NOTHING"
        )
        rows = [
            {
                "pool": pool,
                "status": WAITING,
                "hash": d.hash,
                **_definition_columns(d),
                **self._now_parameter(),
            }
            for d in definitions
        ]
        num_added = 0
        with self._transaction() as connection:
            if not self.is_sqlite:  # concurrent inserts would wait for each other's rows
                lock = f"SELECT pg_advisory_xact_lock({LOCK_KEY}, hashtext(:pool))"
                connection.exec_driver_sql(self._driver_statement(lock), {"pool": pool})
            for row in rows:
                num_added += connection.exec_driver_sql(
                    self._driver_statement(statement), row
                ).rowcount
        return num_added

    def find_ids(self, pool: str, hashes: Sequence[str]) -> dict[str, str]:
        conditions, parameters = self._build_conditions(pool, Condition(hashes=tuple(hashes)))
        rows = self._rows(f"SELECT id, hash FROM {TASKS} WHERE {conditions}", parameters)
        return {row["hash"]: str(row["id"]) for row in rows}

    def claim(self, pool: str, status: str, condition: Condition, change: Change) -> Row | None:
        conditions, parameters = self._build_conditions(pool, condition)
        sets, values = self._set_clause(change)
        rows = self._rows(
            f"UPDATE {TASKS} SET {sets} WHERE id = (SELECT id FROM {TASKS} WHERE {conditions} "
            f"AND status = :claim_status ORDER BY priority DESC, id LIMIT 1 {self._skip_locked}) "
            f"RETURNING {COLUMNS}",
            {**parameters, **values, "claim_status": status},
        )
        return rows[0] if rows else None

    def find_claim(self, pool: str, claim: str) -> Row | None:
        rows = self._rows(
            f"SELECT {COLUMNS} FROM {TASKS} WHERE pool = :pool AND status = '{RUNNING}' "
            "AND claim = :claim",
            {"pool": pool, "claim": claim},
        )
        return rows[0] if rows else None

    def find_expired_rows(self, pool: str) -> list[Row]:
        return self._rows(
            f"SELECT {COLUMNS} FROM {TASKS} WHERE pool = :pool AND status = '{RUNNING}' "
            f"AND {self._is_expired} ORDER BY id",
            {"pool": pool, **self._now_parameter()},
        )

    def change(
        self, id: str, attempt: int, change: Change, *, only_if_expired: bool = False
    ) -> bool:
        sets, values = self._set_clause(change)
        conditions = f"id = :row_id AND attempt = :row_attempt AND status = '{RUNNING}'"
        if only_if_expired:
            conditions += f" AND {self._is_expired}"
        parameters = {
            "row_id": _row_id(id),
            "row_attempt": attempt,
            **self._now_parameter(),
            **values,
        }
        return self._update(f"UPDATE {TASKS} SET {sets} WHERE {conditions}", parameters) == 1

    def change_all(self, pool: str, condition: Condition, change: Change) -> int:
        conditions, parameters = self._build_conditions(pool, condition)
        sets, values = self._set_clause(change)
        return self._update(
            f"UPDATE {TASKS} SET {sets} WHERE {conditions}", {**parameters, **values}
        )

    def redefine(self, id: str, definition: Definition, change: Change) -> bool:
        sets, values = self._set_clause(
            Change({**change.values, "hash": definition.hash, **_definition_columns(definition)})
        )
        try:
            return bool(
                self._update(
                    f"UPDATE {TASKS} SET {sets} WHERE id = :row_id",
                    {**values, "row_id": _row_id(id)},
                )
            )
        except exc.IntegrityError as error:
            raise ValueError("the pool already contains this definition") from error

    def find(self, pool: str, condition: Condition) -> list[Row]:
        conditions, parameters = self._build_conditions(pool, condition)
        return self._rows(
            f"SELECT {COLUMNS} FROM {TASKS} WHERE {conditions} ORDER BY id", parameters
        )

    def count(self, pool: str, condition: Condition) -> dict[str, int]:
        conditions, parameters = self._build_conditions(pool, condition)
        rows = self._rows(
            f"SELECT status, count(*) AS n FROM {TASKS} WHERE {conditions} GROUP BY status",
            parameters,
        )
        return sum_counts((row["status"], int(row["n"])) for row in rows)

    def delete(self, pool: str, condition: Condition) -> int:
        conditions, parameters = self._build_conditions(pool, condition)
        return self._update(f"DELETE FROM {TASKS} WHERE {conditions}", parameters)

    def pools(self) -> list[str]:
        rows = self._rows(f"SELECT DISTINCT pool FROM {TASKS} ORDER BY 1", {})
        return [str(row["pool"]) for row in rows]

    def close(self) -> None:
        self._engine.dispose()

    # -- statements ---------------------------------------------------------------------------

    def _now_parameter(self) -> dict[str, float]:
        """Return the parameters of `_now` and `_clock`; PostgreSQL uses its own clock."""
        if not self.is_sqlite:
            return {}
        return {"now": time.time(), "clock": self._clock_start + time.monotonic()}

    def _set_clause(self, change: Change) -> tuple[str, dict[str, Any]]:
        parts = [f"updated = {self._now}"]
        parameters: dict[str, Any] = self._now_parameter()
        for name, value in change.values.items():
            parts.append(f"{name} = :set_{name}")
            parameters[f"set_{name}"] = value
        minimum = "min" if self.is_sqlite else "least"
        for name, step in change.steps.items():
            parts.append(f"{name} = {minimum}({name}, {MAX_COUNT}) + :add_{name}")
            parameters[f"add_{name}"] = step
        if change.lease is not None:
            parts.append(f"deadline = {self._clock} + :lease")
            parameters["lease"] = float(change.lease)
        elif "status" in change.values:
            parts.append("deadline = NULL")
        return ", ".join(parts), parameters

    def _build_conditions(self, pool: str, condition: Condition) -> tuple[str, dict[str, Any]]:
        parts = ["pool = :pool"]
        parameters: dict[str, Any] = {"pool": pool}
        column_values: dict[str, Sequence[Any] | None] = {
            "id": None if condition.ids is None else [_row_id(i) for i in condition.ids],
            "status": condition.statuses,
            "hash": condition.hashes,
        }
        excluded_statuses = other_statuses(condition.statuses or ())
        if excluded_statuses is not None:
            column_values["status"] = excluded_statuses
        for name, values in column_values.items():
            if values is not None:
                is_excluding = name == "status" and excluded_statuses is not None
                prefix = "NOT " if is_excluding else ""
                parts.append(prefix + self._in_clause(name, f"in_{name}"))
                parameters[f"in_{name}"] = (
                    json.dumps(list(values)) if self.is_sqlite else list(values)
                )
        position = "instr" if self.is_sqlite else "strpos"
        for k, group in enumerate(condition.tokens):
            names = [f"token_{k}_{j}" for j in range(len(group))]
            parameters.update(zip(names, group, strict=True))
            matches = [f"{position}(tokens, :{n}) > 0" for n in names]
            parts.append(f"({' OR '.join(matches)})" if matches else "1 = 0")
        return " AND ".join(parts), parameters

    def _in_clause(self, column: str, name: str) -> str:
        if self.is_sqlite:
            return f"{column} IN (SELECT value FROM json_each(:{name}))"
        return f"{column} = ANY(CAST(:{name} AS {'BIGINT' if column == 'id' else 'TEXT'}[]))"

    def _rows(self, statement: str, parameters: Mapping[str, Any]) -> list[Row]:
        with self._execute(statement, parameters) as cursor:
            names = [column[0] for column in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        return [{**row, "id": str(row["id"])} if "id" in row else row for row in rows]

    def _update(self, statement: str, parameters: Mapping[str, Any]) -> int:
        with self._execute(statement, parameters) as cursor:
            return int(cursor.rowcount)

    @contextmanager
    def _execute(self, statement: str, parameters: Mapping[str, Any]) -> Iterator[Any]:
        """Execute a statement and yield the driver's cursor.

        It bypasses SQLAlchemy, whose overhead would exceed the cost of a claim.
        """
        self._check_file()
        dialect, driver = self._engine.dialect, self._engine.dialect.loaded_dbapi
        connection = cursor = None
        with self._translate_errors():
            try:
                connection = self._engine.raw_connection()
                cursor = connection.cursor()
                cursor.execute(self._driver_statement(statement), dict(parameters))
                yield cursor
            except driver.Error as error:
                driver_connection = connection and connection.driver_connection
                is_disconnect = bool(
                    driver_connection and dialect.is_disconnect(error, driver_connection, cursor)
                )
                if connection and is_disconnect:
                    connection.invalidate(error)
                raise exc.DBAPIError.instance(
                    statement, None, error, driver.Error,
                    connection_invalidated=is_disconnect, dialect=dialect,
                ) from error  # fmt: skip
            finally:
                if connection:
                    connection.close()

    def _driver_statement(self, statement: str) -> str:
        """Convert a statement with `:name` parameters to the driver's form."""
        return statement if self.is_sqlite else _to_pyformat(statement)

    # -- connections --------------------------------------------------------------------------

    def _create_engine(self) -> Engine:
        """Create an engine whose connections commit each statement."""
        options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "pool_size": 3}
        if not self.is_sqlite:
            options["connect_args"] = {"connect_timeout": CONNECT_SECONDS, "keepalives_idle": 30}
            return _open_engine(self.url, options)
        folder = Path(str(self.url.database)).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TaskStoreError(
                f"cannot create the folder {folder} of the task store: {error}"
            ) from error
        options["connect_args"] = {"timeout": BUSY_SECONDS}
        engine = _open_engine(self.url, options)

        @sa.event.listens_for(engine, "connect")
        def configure_connection(connection: Any, record: Any) -> None:
            connection.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            # Another program may have stored text that is not valid UTF-8.
            connection.text_factory = lambda text: text.decode(errors="replace")
            self._file_identity = self._file_identity or self._find_file_identity()

        return engine

    def _find_file_identity(self) -> tuple[int, int] | None:
        """Return device and inode of the SQLite file; None if there is none at its path."""
        try:
            status = os.stat(str(self.url.database))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_dev, status.st_ino

    def _check_file(self) -> None:
        """Raise StoreFileLost if the path no longer leads to the file that the connections use."""
        if self._file_identity is None:
            return
        identity = self._find_file_identity()
        if identity != self._file_identity:
            raise StoreFileLost(
                f"the file {self.url.database} of the task pool was "
                f"{'replaced' if identity else 'deleted'} while it was open: what is written into "
                "the former file is lost. Restore the file if that was a mistake, then start again."
            )

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """A transaction of several statements, begun by hand: the engine commits each statement."""
        self._check_file()
        with self._translate_errors(), self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if self.is_sqlite else "BEGIN")
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                if not connection.invalidated:
                    connection.exec_driver_sql("ROLLBACK")
                raise

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise StoreUnavailable for transient errors, TaskStoreError for permanent ones.

        An IntegrityError passes: the pool contains a definition already, see `redefine`.
        """
        try:
            yield
        except exc.IntegrityError:
            raise
        except (UnicodeEncodeError, OverflowError) as error:  # the driver cannot convert it
            raise TaskStoreError(f"the task store cannot hold a value: {error}") from error
        except exc.DBAPIError as error:
            if self._is_transient(error):
                raise StoreUnavailable(" ".join(str(error.orig).split())[:200]) from error
            raise TaskStoreError(
                f"the task store {redact_urls(self.url.render_as_string())} rejected a statement: "
                f"{redact_urls(' '.join(str(error.orig).split()))}"
            ) from error
        except exc.TimeoutError as error:  # no free connection
            raise StoreUnavailable(str(error)) from error

    def _is_transient(self, error: exc.DBAPIError) -> bool:
        text = str(error.orig)
        if self.is_sqlite:
            return any(word in text for word in TRANSIENT_MESSAGES)
        state = getattr(error.orig, "sqlstate", None)
        if state:
            return str(state).startswith(TRANSIENT_STATES)
        if not isinstance(error, exc.OperationalError | exc.InterfaceError | exc.InternalError):
            return False  # the driver rejects the statement or a value
        return error.connection_invalidated or not PERMANENT_MESSAGES.search(text)

    # -- tables -------------------------------------------------------------------------------

    def _load_clock_start(self) -> float:
        """Return the start of the clock of deadlines, in seconds since 1970; on SQLite only.

        The clock of the machine may be set while tasks are running, so that deadlines are measured
        by the time since the machine was started. All processes use the same start, which the first
        one after a restart of the machine stores.
        """
        boot, now, clock = boot_id(), time.time(), time.monotonic()
        if not boot:
            return now - clock
        with self._translate_errors(), self._engine.connect() as connection:
            start = _read_clock_start(connection, boot)
        if start is not None:
            return start
        with self._transaction() as connection:
            start = _read_clock_start(connection, boot)
            if start is not None:  # another process was faster
                return start
            statements = (
                f"CREATE TABLE IF NOT EXISTS {CLOCKS} (boot TEXT PRIMARY KEY, start REAL NOT NULL)",
                f"INSERT OR REPLACE INTO {CLOCKS} (boot, start) VALUES (:boot, :start)",
                # Changed in the future: the clock was set back since the machine's last run.
                f"UPDATE {TASKS} SET deadline = :now WHERE status = '{RUNNING}' "
                "AND updated > :now + :tolerance",
            )
            values = {"boot": boot, "start": now - clock, "now": now, "tolerance": CLOCK_TOLERANCE}
            for statement in statements:
                connection.exec_driver_sql(statement, values)
            return now - clock

    def _prepare(self) -> None:
        """Create the tables, or migrate those of an older version."""
        with self._translate_errors(), self._engine.connect() as connection:
            version = self._read_version(connection)
        if not is_current_version(version, redact_urls(self.url.render_as_string())):
            with self._transaction() as connection:
                if not self.is_sqlite:
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_KEY}, 0)")
                self._migrate(connection)

    def _read_version(self, connection: Connection) -> int | None:
        """Return the version of the tables; None if there are none."""
        table_query = (
            f"SELECT name FROM sqlite_master WHERE type = 'table' AND name = '{SCHEMA}'"
            if self.is_sqlite
            # Not to_regclass: it may answer from a snapshot before this connection got the lock.
            else "SELECT tablename FROM pg_tables "
            f"WHERE tablename = '{SCHEMA}' AND schemaname = ANY(current_schemas(false))"
        )
        if connection.exec_driver_sql(table_query).scalar() is None:
            return None
        version = connection.exec_driver_sql(f"SELECT max(version) FROM {SCHEMA}").scalar()
        return None if version is None else int(version)

    def _migrate(self, connection: Connection) -> None:
        version = self._read_version(connection)
        template_values = {
            "tasks": TASKS,
            "id": "INTEGER PRIMARY KEY AUTOINCREMENT"
            if self.is_sqlite
            else "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
            "time": "REAL" if self.is_sqlite else "FLOAT8",
        }
        if version is None:
            statements = [TABLE, INDEX, f"CREATE TABLE {SCHEMA} (version BIGINT NOT NULL)"]
        else:
            statements = [s for v in range(version, SCHEMA_VERSION) for s in MIGRATIONS[v]]
        if version != SCHEMA_VERSION:  # else another process has migrated the store
            statements.append(f"INSERT INTO {SCHEMA} (version) VALUES ({SCHEMA_VERSION})")
        for statement in statements:
            connection.exec_driver_sql(statement.format(**template_values))


def _read_clock_start(connection: Connection, boot: str) -> float | None:
    table_query = f"SELECT name FROM sqlite_master WHERE type = 'table' AND name = '{CLOCKS}'"
    if connection.exec_driver_sql(table_query).scalar() is None:
        return None
    query = f"SELECT start FROM {CLOCKS} WHERE boot = :boot"
    start = connection.exec_driver_sql(query, {"boot": boot}).scalar()
    return start if isinstance(start, float) and math.isfinite(start) else None


@functools.lru_cache(maxsize=256)
def _to_pyformat(statement: str) -> str:
    """Convert `:name` to `%(name)s`, as psycopg expects it."""
    return re.sub(r":(\w+)", r"%(\1)s", statement)


def _open_engine(url: URL, options: dict[str, Any]) -> Engine:
    try:
        return sa.create_engine(url, **options)
    except ModuleNotFoundError as error:
        raise TaskStoreError(
            f"a task pool on {url.get_backend_name()} needs {error.name}: "
            f"{install_command('postgres')}."
        ) from error


def _parse_url(text: str) -> URL:
    check_encoding(text, TaskStoreError)
    try:
        url = make_url(text)
    except exc.ArgumentError as error:
        raise TaskStoreError(
            f"{redact_urls(text)!r} is not a database URL: {redact_urls(str(error))}"
        ) from error
    if url.get_backend_name() == "postgres" or url.drivername == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:"):
            raise TaskStoreError(
                f"{redact_urls(text)!r} is a database in memory, which other processes cannot "
                "reach; use a file: sqlite:///path/to/tasks.db."
            )
        return url.set(database=str(resolve_path(str(url.database))))
    return url


def _definition_columns(definition: Definition) -> dict[str, str]:
    return {"definition": definition.text, "tokens": " ".join(definition.tokens)}


def _row_id(id: str) -> int:
    """Convert a task id to the database's type; an invalid id becomes -1, which matches no row."""
    return int(id) if id.isascii() and id.isdigit() and len(id) < 19 else -1
