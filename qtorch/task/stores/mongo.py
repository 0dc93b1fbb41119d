"""Task pools on MongoDB, Qlib's backend: each operation is one atomic change of one document.

Updates are pipelines, so that deadlines are set by the server's clock (`$$NOW`); they are compared
with the server's clock too. This needs MongoDB 4.2 or newer. The database is the one in the URL,
else `qtorch`.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qtorch.core.errors import TaskStoreError, install_command
from qtorch.core.secrets import check_encoding
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
    StoreUnavailable,
    ValueTooLarge,
    is_current_version,
    other_statuses,
    sum_counts,
)

try:
    import pymongo
    from bson import ObjectId
    from bson.errors import BSONError
    from pymongo import errors
    from pymongo.collection import Collection
    from pymongo.database import Database
except ModuleNotFoundError as missing:
    raise TaskStoreError(
        f"a task pool on MongoDB needs {missing.name}: {install_command('mongo')}."
    ) from missing

Document = dict[str, Any]

DATABASE = "qtorch"
SELECTION_MS = 5000  # for pymongo to find the server; after that the caller retries
# Shutting down, stepped down, not primary, write conflict: a retry may succeed.
TRANSIENT_CODES = frozenset({91, 112, 189, 10058, 10107, 11600, 11602, 13435, 13436})
NUM_CANDIDATES = 16  # tasks that one query of a claim finds, in case other workers are faster
# ObjectIds are created in ascending order by one client; they decide between equal times.
CLAIM_ORDER = [("priority", -1), ("created", 1), ("_id", 1)]
TIMES = ("deadline", "created", "updated")
# The fields of a new task, besides those of its definition.
NULL_FIELDS: Document = dict.fromkeys(
    ("origin", "committed", "deadline", "claim", "worker", "run", "progress", "error", "traceback",
     "res")
)  # fmt: skip
ZERO_FIELDS: Document = dict.fromkeys(("priority", "attempt", "errors", "lost", "preemptions"), 0)
# Another program may have removed fields of a task.
EMPTY_ROW: Document = {
    **NULL_FIELDS, **ZERO_FIELDS, **dict.fromkeys(("status", "created", "updated", "definition"))
}  # fmt: skip

# The functions that migrate from each version to the next.
MIGRATIONS: dict[int, Callable[[Database[Document]], None]] = {}


class MongoStore(Store):
    """Stores tasks as documents of the collection `qtorch_tasks`."""

    def __init__(self, url: str) -> None:
        check_encoding(url, TaskStoreError)
        try:
            self._client: pymongo.MongoClient[Document] = pymongo.MongoClient(
                url,
                tz_aware=True,
                appname="qtorch",
                serverSelectionTimeoutMS=SELECTION_MS,
                # Another program may have stored text or times that Python cannot represent.
                unicode_decode_error_handler="replace",
                datetime_conversion="DATETIME_AUTO",
            )
            database = self._client.get_default_database(DATABASE)
        except (errors.InvalidURI, errors.ConfigurationError, ValueError) as error:
            raise TaskStoreError(f"the URL of the task store cannot be used: {error}") from error
        # Read from the primary, which has all claims and commits.
        self._database = database.with_options(read_preference=pymongo.ReadPreference.PRIMARY)
        self._tasks: Collection[Document] = self._database[TASKS]
        with self._translate_errors():
            self._prepare()

    def insert(self, pool: str, definitions: Sequence[Definition]) -> int:
        with self._translate_errors():
            now = self._now()
            documents = [
                {"pool": pool, "hash": d.hash, "status": WAITING, **ZERO_FIELDS, **NULL_FIELDS,
                 "created": now, "updated": now, "definition": d.text, "tokens": list(d.tokens)}
                for d in definitions
            ]  # fmt: skip
            try:
                return len(self._tasks.insert_many(documents, ordered=False).inserted_ids)
            except errors.BulkWriteError as error:
                details = error.details
                if any(e["code"] != 11000 for e in details["writeErrors"]):
                    raise
                return int(details["nInserted"])  # the others exist already (duplicate keys)

    def find_ids(self, pool: str, hashes: Sequence[str]) -> dict[str, str]:
        with self._translate_errors():
            documents = self._tasks.find(
                _filter(pool, Condition(hashes=tuple(hashes))), {"hash": 1}
            )
            return {d["hash"]: str(d["_id"]) for d in documents}

    def claim(self, pool: str, status: str, condition: Condition, change: Change) -> Row | None:
        query = {**_filter(pool, condition), "status": status}
        with self._translate_errors():
            while candidates := list(
                self._tasks.find(query, {"_id": 1}, sort=CLAIM_ORDER, limit=NUM_CANDIDATES)
            ):
                # If another worker was faster, try the next candidates in random order, so that
                # concurrent workers do not compete for the same task again.
                first, *further = candidates
                for candidate in (first, *random.sample(further, len(further))):
                    document = self._tasks.find_one_and_update(
                        # The whole query: the task may have been redefined in the meantime.
                        {**query, "_id": candidate["_id"]},
                        _pipeline(change),
                        return_document=pymongo.ReturnDocument.AFTER,
                    )
                    if document is not None:
                        return _to_row(document)
        return None

    def find_claim(self, pool: str, claim: str) -> Row | None:
        with self._translate_errors():
            document = self._tasks.find_one({"pool": pool, "status": RUNNING, "claim": claim})
            return None if document is None else _to_row(document)

    def find_expired_rows(self, pool: str) -> list[Row]:
        with self._translate_errors():
            query = {**_filter(pool, Condition(statuses=(RUNNING,))), **_is_expired(self._now())}
            return [_to_row(d) for d in self._tasks.find(query, sort=CLAIM_ORDER[1:])]

    def change(
        self, id: str, attempt: int, change: Change, *, only_if_expired: bool = False
    ) -> bool:
        query: Document = {"_id": _object_id(id), "attempt": attempt, "status": RUNNING}
        with self._translate_errors():
            if only_if_expired:
                query.update(_is_expired(self._now()))
            return self._tasks.update_one(query, _pipeline(change)).matched_count == 1

    def change_all(self, pool: str, condition: Condition, change: Change) -> int:
        with self._translate_errors():
            result = self._tasks.update_many(_filter(pool, condition), _pipeline(change))
            return result.matched_count

    def redefine(self, id: str, definition: Definition, change: Change) -> bool:
        values = {
            "hash": definition.hash,
            "definition": definition.text,
            "tokens": list(definition.tokens),
        }
        change = Change({**change.values, **values})
        with self._translate_errors():
            try:
                result = self._tasks.update_one({"_id": _object_id(id)}, _pipeline(change))
            except errors.DuplicateKeyError as error:
                raise ValueError("the pool already contains this definition") from error
            return result.matched_count == 1

    def find(self, pool: str, condition: Condition) -> list[Row]:
        with self._translate_errors():
            documents = self._tasks.find(_filter(pool, condition), sort=CLAIM_ORDER[1:])
            return [_to_row(d) for d in documents]

    def count(self, pool: str, condition: Condition) -> dict[str, int]:
        group = {"$group": {"_id": "$status", "n": {"$sum": 1}}}
        with self._translate_errors():
            groups = self._tasks.aggregate([{"$match": _filter(pool, condition)}, group])
            return sum_counts((d["_id"], int(d["n"])) for d in groups)

    def delete(self, pool: str, condition: Condition) -> int:
        with self._translate_errors():
            return self._tasks.delete_many(_filter(pool, condition)).deleted_count

    def pools(self) -> list[str]:
        with self._translate_errors():
            return sorted(map(str, self._tasks.distinct("pool")))

    def close(self) -> None:
        self._client.close()

    def _now(self) -> datetime.datetime:
        """Return the time of the server's clock."""
        now: datetime.datetime = self._client.admin.command("hello")["localTime"]
        return now

    def _prepare(self) -> None:
        """Create the indexes, or migrate documents of an older version."""
        schema: Collection[Document] = self._database[SCHEMA]
        document = schema.find_one({"_id": "version"})  # None in a new store
        version = None if document is None else int(document["version"])
        if is_current_version(version, self._database.name):
            return
        self._tasks.create_index([("pool", 1), ("hash", 1)], unique=True)
        self._tasks.create_index([("status", 1), ("pool", 1), *CLAIM_ORDER])
        for step in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
            MIGRATIONS[step](self._database)
        schema.update_one({"_id": "version"}, {"$set": {"version": SCHEMA_VERSION}}, upsert=True)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise StoreUnavailable for transient errors, TaskStoreError for permanent ones."""
        try:
            yield
        except (errors.ConnectionFailure, errors.WTimeoutError) as error:
            raise StoreUnavailable(" ".join(str(error).split())[:200]) from error
        except errors.OperationFailure as error:
            if error.code in TRANSIENT_CODES or error.has_error_label("RetryableWriteError"):
                raise StoreUnavailable(str(error)[:200]) from error
            raise TaskStoreError(f"the task store rejected an operation: {error}") from error
        except errors.DocumentTooLarge as error:
            text = f"MongoDB stores at most 16 MB for a task ({' '.join(str(error).split())})."
            raise ValueTooLarge(text) from error
        except (BSONError, UnicodeEncodeError, OverflowError) as error:
            raise TaskStoreError(f"the task store cannot hold a value: {error}") from error


def _is_expired(now: datetime.datetime) -> Document:
    """Return the query for deadlines that have passed, or are no times that qtorch has set."""
    last = now + datetime.timedelta(seconds=MAX_LEASE_SECONDS)
    return {"$nor": [{"deadline": {"$gte": now, "$lte": last}}]}


def _filter(pool: str, condition: Condition) -> Document:
    """Return the query for the tasks of a pool that meet a condition.

    A document whose id is no ObjectId is not a task of qtorch.
    """
    query: Document = {"pool": pool, "_id": {"$type": "objectId"}}
    if condition.ids is not None:
        query["_id"] = {"$in": [_object_id(i) for i in condition.ids]}
    excluded_statuses = other_statuses(condition.statuses or ())
    if excluded_statuses is not None:
        query["status"] = {"$nin": excluded_statuses}
    elif condition.statuses is not None:
        query["status"] = {"$in": list(condition.statuses)}
    if condition.hashes is not None:
        query["hash"] = {"$in": list(condition.hashes)}
    if condition.tokens:
        query["$and"] = [{"tokens": {"$in": list(group)}} for group in condition.tokens]
    return query


def _pipeline(change: Change) -> list[Document]:
    """Return the update pipeline of a change."""
    sets: Document = {"updated": "$$NOW"}
    # Without $literal, a text that begins with $ would be a field's name.
    sets.update({k: {"$literal": v} for k, v in change.values.items()})
    for name, step in change.steps.items():
        is_number = {"$in": [{"$type": f"${name}"}, ["int", "long", "double"]]}
        sets[name] = {"$add": [{"$cond": [is_number, {"$min": [f"${name}", MAX_COUNT]}, 0]}, step]}
    if change.lease is not None:
        sets["deadline"] = {"$add": ["$$NOW", round(change.lease * 1000)]}
    elif "status" in change.values:  # nobody works on the task any more
        sets["deadline"] = None
    return [{"$set": sets}]


def _to_row(document: Mapping[str, Any]) -> Row:
    """Convert a document: the id to text, times to seconds since 1970."""
    row = {**EMPTY_ROW, **{k: v for k, v in document.items() if k not in ("_id", "tokens")}}
    row["id"] = str(document["_id"])
    for name in TIMES:
        if isinstance(row[name], datetime.datetime):
            row[name] = row[name].timestamp()
    return row


def _object_id(id: str) -> ObjectId | str:
    """Convert a task id to the database's type; an invalid id matches no document."""
    return ObjectId(id) if ObjectId.is_valid(id) else id
