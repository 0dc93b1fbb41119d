"""Pools on MongoDB, Qlib's backend: each step is one atomic change of one document.

Updates are pipelines, so that deadlines are set by the server's clock (`$$NOW`), and compared with
what the server says that it is; the server is MongoDB 4.2 or newer. The database is the one that
the URL names, else `qtorch`.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qtorch.core.errors import TaskStoreError, TaskStoreVersionError
from qtorch.task.definition import Definition
from qtorch.task.query import RUNNING, WAITING, Condition
from qtorch.task.store import SCHEMA, SCHEMA_VERSION, TASKS, Change, Row, Store, StoreAway

try:
    import pymongo
    from bson import ObjectId
    from pymongo import errors
    from pymongo.collection import Collection
    from pymongo.database import Database
except ModuleNotFoundError as missing:
    raise TaskStoreError(
        f"a pool on mongodb needs {missing.name}: pip install 'qtorch[mongo]'."
    ) from missing

Document = dict[str, Any]

DATABASE = "qtorch"
ANSWER_MS = 5000  # for a server to be found; retrying goes on from there
# Shutting down, stepped down, not primary, write conflict: the next try may find it well.
PASSING_CODES = frozenset({91, 112, 189, 10058, 10107, 11600, 11602, 13435, 13436})
CANDIDATES = 16
TURN = [("priority", -1), ("created", 1), ("_id", 1)]
TIMES = ("deadline", "created", "updated")
EMPTY: Document = dict.fromkeys(
    ("origin", "committed", "deadline", "claim", "worker", "run", "progress", "error", "traceback",
     "res")
)  # fmt: skip
ZERO: Document = dict.fromkeys(("priority", "attempt", "errors", "lost", "preemptions"), 0)

# What brings a store of an older version to the next: {from: step}.
MIGRATIONS: dict[int, Callable[[Database[Document]], None]] = {}


class MongoStore(Store):
    """Tasks as documents of one collection, `qtorch_tasks`."""

    def __init__(self, url: str) -> None:
        try:
            self._client: pymongo.MongoClient[Document] = pymongo.MongoClient(
                url, tz_aware=True, appname="qtorch", serverSelectionTimeoutMS=ANSWER_MS
            )
            database = self._client.get_default_database(DATABASE)
        except (errors.InvalidURI, errors.ConfigurationError, ValueError) as error:
            raise TaskStoreError(f"the URL of the task store cannot be used: {error}") from error
        # Claims and commits are read where they were written.
        self._database = database.with_options(read_preference=pymongo.ReadPreference.PRIMARY)
        self._tasks: Collection[Document] = self._database[TASKS]
        with self._answering():
            self._prepare()

    def insert(self, pool: str, definitions: Sequence[Definition]) -> int:
        with self._answering():
            now = self._now()
            documents = [
                {"pool": pool, "hash": d.hash, "status": WAITING, **ZERO, **EMPTY,
                 "created": now, "updated": now, "definition": d.text, "tokens": list(d.tokens)}
                for d in definitions
            ]  # fmt: skip
            try:
                return len(self._tasks.insert_many(documents, ordered=False).inserted_ids)
            except errors.BulkWriteError as error:
                told = error.details
                if any(e["code"] != 11000 for e in told["writeErrors"]):
                    raise
                return int(told["nInserted"])  # the others are there already

    def ids(self, pool: str, hashes: Sequence[str]) -> dict[str, str]:
        with self._answering():
            found = self._tasks.find(_filter(pool, Condition(hashes=tuple(hashes))), {"hash": 1})
            return {d["hash"]: str(d["_id"]) for d in found}

    def claim(self, pool: str, status: str, condition: Condition, change: Change) -> Row | None:
        wanted = {**_filter(pool, condition), "status": status}
        with self._answering():
            while found := list(self._tasks.find(wanted, {"_id": 1}, sort=TURN, limit=CANDIDATES)):
                # The first; if another worker was quicker, any of the next, so that workers which
                # came together do not all reach for the same one again.
                first, *others = found
                for candidate in (first, *random.sample(others, len(others))):
                    document = self._tasks.find_one_and_update(
                        {"_id": candidate["_id"], "status": status},
                        _pipeline(change),
                        return_document=pymongo.ReturnDocument.AFTER,
                    )
                    if document is not None:
                        return _row(document)
        return None

    def claimed(self, pool: str, claim: str) -> Row | None:
        with self._answering():
            found = self._tasks.find_one({"pool": pool, "status": RUNNING, "claim": claim})
            return None if found is None else _row(found)

    def expired(self, pool: str) -> list[Row]:
        with self._answering():
            wanted = {"pool": pool, "status": RUNNING, "deadline": {"$lt": self._now()}}
            return [_row(d) for d in self._tasks.find(wanted, sort=TURN[1:])]

    def change(self, id: str, attempt: int, change: Change, *, expired: bool = False) -> bool:
        wanted: Document = {"_id": _object_id(id), "attempt": attempt, "status": RUNNING}
        with self._answering():
            if expired:
                wanted["deadline"] = {"$lt": self._now()}
            return self._tasks.update_one(wanted, _pipeline(change)).matched_count == 1

    def change_all(self, pool: str, condition: Condition, change: Change) -> int:
        with self._answering():
            done = self._tasks.update_many(_filter(pool, condition), _pipeline(change))
            return done.matched_count

    def redefine(self, id: str, definition: Definition, change: Change) -> bool:
        values = {
            "hash": definition.hash,
            "definition": definition.text,
            "tokens": list(definition.tokens),
        }
        change = Change({**change.values, **values})
        with self._answering():
            try:
                done = self._tasks.update_one({"_id": _object_id(id)}, _pipeline(change))
            except errors.DuplicateKeyError as error:
                raise ValueError("the pool holds this definition already") from error
            return done.matched_count == 1

    def find(self, pool: str, condition: Condition) -> list[Row]:
        with self._answering():
            found = self._tasks.find(_filter(pool, condition), sort=TURN[1:])
            return [_row(d) for d in found]

    def count(self, pool: str, condition: Condition) -> dict[str, int]:
        group = {"$group": {"_id": "$status", "n": {"$sum": 1}}}
        with self._answering():
            found = self._tasks.aggregate([{"$match": _filter(pool, condition)}, group])
            return {d["_id"]: int(d["n"]) for d in found}

    def delete(self, pool: str, condition: Condition) -> int:
        with self._answering():
            return self._tasks.delete_many(_filter(pool, condition)).deleted_count

    def pools(self) -> list[str]:
        with self._answering():
            return sorted(self._tasks.distinct("pool"))

    def close(self) -> None:
        self._client.close()

    def _now(self) -> datetime.datetime:
        """The server's clock."""
        now: datetime.datetime = self._client.admin.command("hello")["localTime"]
        return now

    def _prepare(self) -> None:
        """Make the indexes, or bring the documents of an older version up to date."""
        schema: Collection[Document] = self._database[SCHEMA]
        found = schema.find_one({"_id": "version"})
        version = None if found is None else int(found["version"])
        if version is not None and version > SCHEMA_VERSION:
            raise TaskStoreVersionError(
                f"the task store {self._database.name!r} has version {version} of its documents, "
                f"this qtorch knows up to {SCHEMA_VERSION}. Update qtorch here, or use another "
                "database."
            )
        if version == SCHEMA_VERSION:
            return
        self._tasks.create_index([("pool", 1), ("hash", 1)], unique=True)
        self._tasks.create_index([("status", 1), ("pool", 1), *TURN])
        for step in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
            MIGRATIONS[step](self._database)
        schema.update_one({"_id": "version"}, {"$set": {"version": SCHEMA_VERSION}}, upsert=True)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Tells errors that pass (StoreAway) from those that do not (TaskStoreError)."""
        try:
            yield
        except (errors.ConnectionFailure, errors.WTimeoutError) as error:
            raise StoreAway(" ".join(str(error).split())[:200]) from error
        except errors.OperationFailure as error:
            if error.code in PASSING_CODES or error.has_error_label("RetryableWriteError"):
                raise StoreAway(str(error)[:200]) from error
            raise TaskStoreError(f"the task store refused: {error}") from error


def _filter(pool: str, condition: Condition) -> Document:
    wanted: Document = {"pool": pool}
    if condition.ids is not None:
        wanted["_id"] = {"$in": [_object_id(i) for i in condition.ids]}
    if condition.statuses is not None:
        wanted["status"] = {"$in": list(condition.statuses)}
    if condition.hashes is not None:
        wanted["hash"] = {"$in": list(condition.hashes)}
    if condition.tokens:
        wanted["$and"] = [{"tokens": {"$in": list(group)}} for group in condition.tokens]
    return wanted


def _pipeline(change: Change) -> list[Document]:
    sets: Document = {"updated": "$$NOW"}
    sets.update({k: {"$literal": v} for k, v in change.values.items()})
    sets.update({k: {"$add": [f"${k}", step]} for k, step in change.steps.items()})
    if change.lease is not None:
        sets["deadline"] = {"$add": ["$$NOW", round(change.lease * 1000)]}
    elif "status" in change.values:
        sets["deadline"] = None
    return [{"$set": sets}]


def _row(document: Mapping[str, Any]) -> Row:
    row = {k: v for k, v in document.items() if k not in ("_id", "tokens")}
    row["id"] = str(document["_id"])
    for name in TIMES:
        if isinstance(row[name], datetime.datetime):
            row[name] = row[name].timestamp()
    return row


def _object_id(id: str) -> ObjectId | str:
    """An id as the database has it; one of another form matches no document."""
    return ObjectId(id) if ObjectId.is_valid(id) else id
