"""Find a store and a run as a user names them: the folder above, `latest`, a prefix, a name."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qtorch.core.errors import check_name, join_names
from qtorch.core.session import resolve_path, session, set_defaults
from qtorch.tracking.locations import SQLITE, sqlite_path
from qtorch.tracking.manager import R
from qtorch.tracking.recorder import Recorder
from qtorch.tracking.store_types import NotInStoreError, RunRow

log = logging.getLogger(__name__)

LATEST = "latest"
LOCAL_STORE = Path("mlruns", "mlflow.db")
_RUN_ID, _PREFIX = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{4,31}")


def select_store() -> None:
    """Use the store of the nearest folder above if this folder has none and no URI is set.

    Nothing is created. Raises NotInStoreError if there is no store.
    """
    path = sqlite_path(R.get_uri())
    if path is None or path.exists():
        return
    folder = resolve_path("")
    is_chosen = session().tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if is_chosen or path != folder / LOCAL_STORE:
        raise NotInStoreError(f"there is no tracking store {path}.")
    for parent in folder.parents:
        if (parent / LOCAL_STORE).is_file():
            log.info("using the tracking store of %s", parent)
            set_defaults(tracking_uri=f"{SQLITE}{parent / LOCAL_STORE}")
            return
    raise NotInStoreError(
        f"there is no tracking store in {folder} ({LOCAL_STORE}) or a folder above it. Change to "
        "the folder in which the run was started, or add tracking.uri=..."
    )


def select_run(
    text: str, *, status: str | None = None, without_tags: Collection[str] = ()
) -> Recorder:
    """Return the run that a user means: an ID, the first digits of one, a name, or `latest`.

    `latest` is the newest run that has the status, if one is given, and none of the tags. Of
    several runs with a name the newest one counts. Raises NotInStoreError if there is none, or if
    several IDs begin with the digits.
    """
    select_store()
    if _RUN_ID.fullmatch(text):
        return R.get_recorder(recorder_id=text)
    rows = list_runs()
    if text == LATEST:
        matches = [
            r for r in rows if status in (None, r.status) and not r.tags.keys() & set(without_tags)
        ]
    else:
        matches = _matching_runs(rows, text)
    if not matches:
        recent = join_names([f"{r.id} ({r.name})" for r in rows], 3) or "none"
        kind = f"no run that is {status}" if text == LATEST and status else f"no run {text!r}"
        raise NotInStoreError(
            f"there is {kind} in {_store_name()}. Newest runs: {recent}. `qtorch runs` lists all."
        )
    return R.get_recorder(recorder_id=matches[0].id)


def list_runs(experiment_name: str | None = None, **options: Any) -> list[RunRow]:
    """Return the runs of an experiment or of all, the newest first.

    `options` are those of `MLflowStore.runs`: `filter_string`, `max_results`, ...
    """
    from qtorch.tracking.mlflow_store import open_store

    experiments = R.list_experiments()
    if experiment_name is not None:
        check_name("experiment", experiment_name, experiments, error=NotInStoreError)
        experiments = {experiment_name: experiments[experiment_name]}
    rows = open_store(R.get_uri()).runs([e.id for e in experiments.values()], **options)
    return sorted(rows, key=lambda r: r.start_time or 0, reverse=True)


def _matching_runs(rows: list[RunRow], text: str) -> list[RunRow]:
    named = [r for r in rows if r.name == text]
    if named or not _PREFIX.fullmatch(text):
        return named
    prefixed = [r for r in rows if r.id.startswith(text)]
    if len(prefixed) > 1:
        ids = join_names([r.id for r in prefixed], 4)
        raise NotInStoreError(f"several runs begin with {text!r}: {ids}. Give more digits.")
    return prefixed


def _store_name() -> str:
    path = sqlite_path(R.get_uri())
    return "the tracking store" if path is None else f"the tracking store {path}"
