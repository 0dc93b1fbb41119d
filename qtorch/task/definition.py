"""The parts of a task that a pool stores as JSON: its definition, identity and result."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qtorch.core.configured import plain_value
from qtorch.core.errors import ConfigError, TaskDefinitionError, TaskResultError
from qtorch.core.identity import canonical_json
from qtorch.core.plain import convert_tree, is_numpy_scalar, is_plain_scalar
from qtorch.core.secrets import redact_urls
from qtorch.core.trust import as_stored_text

RECORDER = "$recorder"  # key of a run's ids in a stored result
MAX_DEPTH = 100  # of nested lists and dicts in a stored value
TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


class Task(dict[str, Any]):
    """A task of a pool, as in Qlib: a dict with `_id`, `def`, `res`, `status` and `priority`.

    Further keys:
    attempt: how often it was claimed; changes of an older attempt are rejected.
    errors, lost, preemptions: how often it failed, lost its lease, was returned after a stop.
    worker: id, host and pid of the last claim.
    deadline, created, updated: seconds since 1970 by the store's clock.
    error, traceback: of the last failure.
    run: experiment_id, recorder_id and tracking_uri of its run, if it has one.
    progress: the last progress that its worker has reported.
    """

    is_settling = False  # whether a change that ends the lease was sent

    def __repr__(self) -> str:
        return f"Task({self.get('_id')}, {self.get('status')}, attempt {self.get('attempt')})"


@dataclass(frozen=True)
class Definition:
    """A definition as it is stored: its JSON text, its hash, and tokens for queries.

    Each token is the hash of one dotted path and its value, so that a store can answer a query
    like `{"model.seed": 1}` by comparing tokens, without reading any definition.
    """

    text: str
    hash: str
    tokens: tuple[str, ...]


def encode_definition(definition: Mapping[str, Any]) -> Definition:
    """Encode a definition for the store.

    Definitions count as equal if their canonical forms are: the order of keys, tuple or list, and
    `class` with `kwargs` or `_target_` make no difference. Raises TaskDefinitionError for a live
    object, which another process could not rebuild, and if `definition` is not a mapping.
    """
    if not isinstance(definition, Mapping):
        raise TaskDefinitionError(
            f"a task's definition must be a dict; got {type(definition).__name__}."
        )
    try:
        plain = plain_value(definition, "task")
        canonical = canonical_json(definition)
        _check_parts(plain)
    except ConfigError as error:
        raise TaskDefinitionError(f"the pool cannot store this task: {error}") from error
    except (ValueError, RecursionError) as error:
        raise TaskDefinitionError(f"the pool cannot store this task: {TOO_DEEP}.") from error
    # A query may use the user's spelling (`class`, `kwargs`) or the canonical one (`_target_`).
    tokens = {token for form in (plain, json.loads(canonical)) for token in _query_tokens(form)}
    return Definition(json.dumps(plain), _hash_canonical(canonical), tuple(sorted(tokens)))


def decode_definition(text: str) -> dict[str, Any]:
    """Decode a stored definition; raise ValueError with the reason if it is invalid."""
    value = decode_mapping(text)
    _check_parts(value, only_finite=True)
    definition: dict[str, Any] = as_stored_text(value)
    return definition


def decode_mapping(text: str) -> dict[str, Any]:
    """Decode a column with a JSON object; raise ValueError with the reason if it is none."""
    value = decode_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__}, not an object")
    return value


def decode_json(text: str) -> Any:
    """Decode the JSON text of a column; raise ValueError with the reason if it is invalid.

    Another program may have written the column, so it may contain anything.
    """
    if not isinstance(text, str):
        raise ValueError(f"it is {type(text).__name__}, not text")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    _check_parts(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return value


def _check_parts(value: Any, *, only_finite: bool = False) -> None:
    """Raise ValueError if a value is nested too deeply, or for NaN and infinity if `only_finite`.

    Without recursion, which would fail at some depth.
    """
    parts, depth = [value], 0
    while parts:
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)
        if only_finite and any(isinstance(p, float) and not math.isfinite(p) for p in parts):
            raise ValueError("it contains NaN or a number that is infinite")
        depth += 1
        parts = [
            inner
            for part in parts
            if isinstance(part, dict | list)
            for inner in (part.values() if isinstance(part, dict) else part)
        ]


def query_token(path: str, value: Any) -> str:
    """Return the token of "the value at this dotted path is `value`"; 1 and 1.0 are equal."""
    text = json.dumps(convert_tree(value, _unify_number), sort_keys=True, separators=(",", ":"))
    return _short_hash(f"{path}={text}", 16)


def definition_hash(definition: Mapping[str, Any]) -> str:
    """Return the hash by which the pool recognizes equal definitions."""
    return _hash_canonical(canonical_json(definition))


def encode_result(result: Any) -> str:
    """Encode a result as JSON text; a Recorder is stored as its ids, a tuple as a list.

    Raises TaskResultError for other objects that are not plain data.
    """
    try:
        plain = convert_tree(result, _plain_result_part, "result")
        _check_parts(plain)
    except (ValueError, RecursionError) as error:
        raise TaskResultError(f"the pool cannot store this result: {TOO_DEEP}.") from error
    return json.dumps(plain)


def decode_result(text: str | None) -> Any:
    """Decode a stored result, in which runs are `{"$recorder": ids}`.

    Raises ValueError with the reason if it is invalid.
    """
    if text is None:
        return None
    return as_stored_text(convert_tree(decode_json(text), _check_reference))


def restore_recorders(result: Any) -> Any:
    """Replace the ids of runs in a result by Recorders; NotInStoreError for a run that is gone."""
    return convert_tree(result, _restore_recorder)


def recorder_reference(recorder: Any) -> dict[str, Any]:
    """Return the ids that identify a run: experiment_id, recorder_id, tracking_uri."""
    return {
        "experiment_id": recorder.experiment_id,
        "recorder_id": recorder.id,
        "tracking_uri": redact_urls(recorder.uri),
    }


def _query_tokens(form: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the token of each key of a definition, nested ones by their dotted path."""
    for key, value in form.items():
        path = f"{prefix}{key}"
        yield query_token(path, value)
        if isinstance(value, Mapping):
            yield from _query_tokens(value, f"{path}.")


def _hash_canonical(canonical: str) -> str:
    return _short_hash(canonical, 32)


def _short_hash(text: str, digits: int) -> str:
    # surrogatepass: a file name that is not valid UTF-8 contains surrogates.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]


# The functions below are called by `convert_tree` for each part of a value; `location` names the
# part, such as `result.scores[0]`.


def _unify_number(value: Any, location: str) -> Any:
    """Give equal numbers the same form: integral floats become ints."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain_result_part(value: Any, location: str) -> Any:
    """Convert a part of a result that JSON cannot hold; TaskResultError if that is impossible."""
    if is_plain_scalar(value) or isinstance(value, Mapping | list | tuple):
        return value
    if is_numpy_scalar(value):
        return value.item()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, PurePath):
        return str(value)
    from qtorch.tracking.recorder import Recorder  # here, because it imports pandas

    if isinstance(value, Recorder):
        return {RECORDER: recorder_reference(value)}
    raise TaskResultError(
        f"{location} is a {type(value).__name__}, but the pool stores only numbers, text, lists, "
        "dicts and recorders. Save the object in a run (recorder.save_objects) and return the "
        "recorder."
    )


def _check_reference(value: Any, location: str) -> Any:
    reference = value.get(RECORDER) if _is_reference(value) else {"recorder_id": ""}
    if not isinstance(reference, dict) or not isinstance(reference.get("recorder_id"), str):
        raise ValueError(f"its {RECORDER} does not name a run")
    return value


def _restore_recorder(value: Any, location: str) -> Any:
    return _load_recorder(value[RECORDER]) if _is_reference(value) else value


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {RECORDER}


def _load_recorder(reference: Mapping[str, Any]) -> Any:
    from qtorch.tracking.manager import R

    ids = {name: reference.get(name) for name in ("recorder_id", "experiment_id")}
    uri = reference.get("tracking_uri")
    if not uri:
        return R.get_recorder(**ids)
    with R.uri_context(uri):
        return R.get_recorder(**ids)
