"""What a pool stores of a task: its definition, its identity, its result; all plain JSON."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qtorch.core.configured import is_numpy_scalar, plain_value
from qtorch.core.errors import ConfigError, TaskDefinitionError, TaskResultError
from qtorch.core.identity import canonical_json

RECORDER = "$recorder"  # the key under which a result holds a run by its ids


class Task(dict[str, Any]):
    """One task of a pool, as Qlib's: a mapping with `_id`, `def`, `res`, `status`, `priority`.

    Beside them: `attempt` (how often it was claimed; the number that fences off older claims),
    `errors`, `lost`, `preemptions` (how often it failed, lost its lease, was handed back),
    `worker` (id, host, pid of the last claim), `deadline`, `created`, `updated` (seconds since
    1970 by the store's clock), `error` and `traceback` of the last failure, `run` (experiment_id,
    recorder_id, tracking_uri of its run, once it has one), `progress` (what its worker last told).
    """

    settling = False  # a change that ends its lease is on its way

    def __repr__(self) -> str:
        return f"Task({self.get('_id')}, {self.get('status')}, attempt {self.get('attempt')})"


@dataclass(frozen=True)
class Definition:
    """A definition as it is stored: its JSON text, its hash, the tokens that queries look for."""

    text: str
    hash: str
    tokens: tuple[str, ...]


def encode_definition(definition: Mapping[str, Any]) -> Definition:
    """The stored form of a definition.

    Two definitions are equal where their canonical forms are (order of keys, tuple or list,
    `class` with `kwargs` or `_target_`). Raises TaskDefinitionError for a live object, which
    another process could not rebuild, and for what is no mapping.
    """
    if not isinstance(definition, Mapping):
        raise TaskDefinitionError(
            f"a task's definition is a dict; got {type(definition).__name__}."
        )
    try:
        plain = plain_value(definition, "task")
        canonical = canonical_json(definition)
    except ConfigError as error:
        raise TaskDefinitionError(f"the pool cannot store this task: {error}") from error
    tokens = {token for form in (plain, json.loads(canonical)) for token in _tokens(form)}
    return Definition(json.dumps(plain), _short_hash(canonical, 32), tuple(sorted(tokens)))


def decode_definition(text: str) -> dict[str, Any]:
    """The definition behind a stored text; TaskDefinitionError where it is none."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as error:
        raise TaskDefinitionError(
            f"the stored definition is no JSON ({error}); replace the task or remove it."
        ) from error
    if not isinstance(value, dict):
        raise TaskDefinitionError(
            f"the stored definition is a JSON {type(value).__name__}, not an object; replace the "
            "task or remove it."
        )
    return value


def token(path: str, value: Any) -> str:
    """The mark that a definition has where `path` (dotted) holds `value`; 1 and 1.0 are equal."""
    text = json.dumps(_unified(value), sort_keys=True, separators=(",", ":"))
    return _short_hash(f"{path}={text}", 16)


def hash_of(definition: Mapping[str, Any]) -> str:
    """The hash under which the pool keeps a definition once."""
    return _short_hash(canonical_json(definition), 32)


def encode_result(result: Any) -> str:
    """A result as JSON text; a Recorder becomes its ids, a tuple a list.

    Raises TaskResultError for anything else that is no plain data.
    """
    return json.dumps(_encoded(result, "the result"))


def decode_result(text: str | None, *, live: bool = True) -> Any:
    """A stored result; with `live` the ids of a run become a Recorder again."""
    if text is None:
        return None
    value = json.loads(text)
    return _revived(value) if live else value


def recorder_reference(recorder: Any) -> dict[str, Any]:
    """What finds a run again: experiment_id, recorder_id, tracking_uri."""
    return {
        "experiment_id": recorder.experiment_id,
        "recorder_id": recorder.id,
        "tracking_uri": getattr(recorder, "uri", None),
    }


def _tokens(form: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in form.items():
        path = f"{prefix}{key}"
        yield token(path, value)
        if isinstance(value, Mapping):
            yield from _tokens(value, f"{path}.")


def _unified(value: Any) -> Any:
    """Numbers that are equal get one form."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(k): _unified(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_unified(v) for v in value]
    return value


def _short_hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]


def _encoded(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _encoded(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(v, f"{where}[{k}]") for k, v in enumerate(value)]
    if _is_recorder(value):
        return {RECORDER: recorder_reference(value)}
    if is_numpy_scalar(value):
        return value.item()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, PurePath):
        return str(value)
    raise TaskResultError(
        f"{where} is a {type(value).__name__}, which the pool does not store (it keeps numbers, "
        "text, lists, dicts and recorders). Save it in a run (recorder.save_objects) and return "
        "the recorder."
    )


def _is_recorder(value: Any) -> bool:
    module = sys.modules.get("qtorch.tracking.recorder")
    return module is not None and isinstance(value, module.Recorder)


def _revived(value: Any) -> Any:
    if isinstance(value, list):
        return [_revived(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {RECORDER}:
        return _recorder(value[RECORDER])
    return {k: _revived(v) for k, v in value.items()}


def _recorder(reference: Mapping[str, Any]) -> Any:
    from qtorch.tracking.r import R

    ids = {"recorder_id": reference["recorder_id"], "experiment_id": reference["experiment_id"]}
    uri = reference.get("tracking_uri")
    if not uri:
        return R.get_recorder(**ids)
    with R.uri_context(uri):
        return R.get_recorder(**ids)
