"""MLflow behind one door: the only module that imports it.

Everything goes through a client of one tracking URI; MLflow's own global URI and active run are
neither read nor set. Its environment variables (credentials, timeouts, system metrics) hold.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mlflow.store.db_migrations
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from qtorch.core.errors import TrackingError
from qtorch.tracking.errors import AlreadyInStoreError, NotInStoreError, RefusedError
from qtorch.tracking.locations import cache_folder, file_lock, redacted, resolve_uri, sqlite_path
from qtorch.tracking.rows import ExperimentRow, MetricPoint, RunRow
from qtorch.tracking.sqlite_file import ensure_sqlite_store

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_METRICS, MAX_PARAMS, PAGE = 1000, 100, 1000
TIMEOUT_VARIABLE = "QTORCH_TRACKING_TIMEOUT"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
LOCKED_ATTEMPTS, _LOCKED = 5, "database is locked"
_KINDS: dict[str, type[TrackingError]] = {
    "RESOURCE_DOES_NOT_EXIST": NotInStoreError,
    "RESOURCE_ALREADY_EXISTS": AlreadyInStoreError,
    "INVALID_PARAMETER_VALUE": RefusedError,
}
_INFINITE = sys.float_info.max  # what MLflow stores for an infinite value

_stores: dict[tuple[int, str], MLflowStore] = {}
_stores_lock = threading.Lock()


def store_at(uri: str) -> MLflowStore:
    """The store of a tracking URI, opened once a process.

    Raises TrackingError, within seconds, where nothing answers.
    """
    resolved = resolve_uri(uri)
    key = (os.getpid(), resolved)
    with _stores_lock:
        if key not in _stores:
            _stores[key] = MLflowStore(resolved)
        return _stores[key]


class MLflowStore:
    """Experiments, runs and artifacts of one tracking URI, errors in qtorch's own classes."""

    def __init__(self, uri: str) -> None:
        self.uri = resolve_uri(uri)
        self.check_answers()
        path = sqlite_path(self.uri)
        if path is not None:
            self._ask("make", lambda: ensure_sqlite_store(path, _schema_name(), _migrate))
            self.client = self._ask("open", lambda: MlflowClient(tracking_uri=self.uri))
        else:
            # A fresh database of a server is migrated by the first who opens it.
            name = sha256(self.uri.encode()).hexdigest()[:16]
            with file_lock(cache_folder() / f"open-{name}.lock"):
                self.client = self._ask("open", lambda: MlflowClient(tracking_uri=self.uri))
                self._ask("open", lambda: self.client.search_experiments(max_results=1))
        _opened.add(self)

    def check_answers(self) -> None:
        """TrackingError, within QTORCH_TRACKING_TIMEOUT seconds (10), unless the server is there.

        MLflow's own requests go on retrying for minutes, so this stands before each of them.
        """
        parts = urlsplit(self.uri)
        port = DATABASE_PORTS.get(parts.scheme.split("+")[0])
        timeout = float(os.environ.get(TIMEOUT_VARIABLE, "10"))
        try:
            if parts.scheme in ("http", "https"):
                _get_health(self.uri, timeout)
            elif port and parts.hostname and "," not in parts.hostname:
                address = (parts.hostname, parts.port or port)
                socket.create_connection(address, timeout=timeout).close()
        except (MlflowException, OSError, ValueError) as error:
            raise TrackingError(
                f"the tracking server {redacted(self.uri)} does not answer ({_reason(error)}). "
                "Start it, or give another tracking URI."
            ) from error

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """The answer, or MLflow's error as one of qtorch's.

        A sqlite file that other processes hold for longer than MLflow waits is asked again.
        """
        self.check_answers()
        for attempt in range(LOCKED_ATTEMPTS):
            try:
                return call()
            except TrackingError:
                raise
            except Exception as error:
                if _LOCKED in str(error) and attempt + 1 < LOCKED_ATTEMPTS:
                    log.debug("could not %s: the database is locked", what)
                    time.sleep(random.uniform(0.05, 0.5))
                    continue
                code = str(getattr(error, "error_code", ""))
                raise _KINDS.get(code, TrackingError)(self._failed(what, error)) from error
        raise AssertionError("the last attempt returns or raises")

    def _failed(self, what: str, error: Exception) -> str:
        return f"could not {what} at {redacted(self.uri)}: {_first_line(error)}"

    # Experiments

    def experiment(self, *, id: str | None = None, name: str | None = None) -> ExperimentRow | None:
        """The experiment, a deleted one too; None where there is none."""
        what = f"read the experiment {name or id!r}"
        try:
            if id is not None:
                found: Any = self._ask(what, lambda: self.client.get_experiment(str(id)))
            else:
                found = self._ask(what, lambda: self.client.get_experiment_by_name(name or ""))
        except (NotInStoreError, RefusedError):
            return None
        return None if found is None else _experiment_row(found)

    def create_experiment(self, name: str) -> ExperimentRow:
        """A new experiment; AlreadyInStoreError where the name is taken, by a deleted one too."""
        path = sqlite_path(self.uri)
        folder = None if path is None else str(path.parent / "artifacts" / _folder_name(name))
        created = self._ask(
            f"create the experiment {name!r}",
            lambda: self.client.create_experiment(name, artifact_location=folder),
        )
        return ExperimentRow(str(created), name)

    def experiments(self) -> list[ExperimentRow]:
        """All that are not deleted."""
        found = self._ask(
            "list the experiments", lambda: list(_pages(self.client.search_experiments))
        )
        return [_experiment_row(e) for e in found]

    def delete_experiment(self, id: str) -> None:
        """Mark it deleted, as MLflow does; `mlflow gc` removes it for good."""
        self._ask(f"delete the experiment {id}", lambda: self.client.delete_experiment(id))

    # Runs

    def create_run(
        self, experiment_id: str, name: str | None, tags: Mapping[str, str], start_time: int
    ) -> RunRow:
        """A new run, status RUNNING."""
        run = self._ask(
            "create a run",
            lambda: self.client.create_run(
                experiment_id, start_time=start_time, tags=dict(tags), run_name=name
            ),
        )
        return _run_row(run)

    def run(self, run_id: str) -> RunRow:
        """One run; NotInStoreError where there is none."""
        try:
            return _run_row(self._ask(f"read run {run_id}", lambda: self.client.get_run(run_id)))
        except RefusedError as error:
            raise NotInStoreError(str(error)) from error

    def set_status(self, run_id: str, status: str, end_time: int | None = None) -> None:
        """A final status with its end, or RUNNING again."""
        what = f"set the run {run_id} to {status}"
        if end_time is None:
            self._ask(what, lambda: self.client.update_run(run_id, status=status))
        else:
            self._ask(what, lambda: self.client.set_terminated(run_id, status, end_time))

    def delete_run(self, run_id: str) -> None:
        """Mark it deleted."""
        self._ask(f"delete the run {run_id}", lambda: self.client.delete_run(run_id))

    def runs(
        self,
        experiment_ids: Sequence[str],
        *,
        filter_string: str = "",
        run_view_type: int = 1,
        max_results: int = 100_000,
        order_by: Sequence[str] | None = None,
    ) -> list[RunRow]:
        """Runs by MLflow's filter language, the newest first unless `order_by` says else."""

        def page(page_token: str | None, max_results: int) -> Any:
            return self.client.search_runs(
                list(experiment_ids),
                filter_string,
                run_view_type,
                max_results,
                list(order_by) if order_by else None,
                page_token,
            )

        found = self._ask("search the runs", lambda: list(_pages(page, max_results)))
        return [_run_row(run) for run in found]

    # What a run logs

    def log_batch(
        self,
        run_id: str,
        metrics: Iterable[MetricPoint] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """At most 1000 metrics, 100 params, 100 tags, all or nothing.

        A metric of the same step, time and value is not stored twice.
        """
        points = [Metric(m.key, m.value, m.time, m.step) for m in metrics]
        held = [Param(k, v) for k, v in (params or {}).items()]
        marks = [RunTag(k, v) for k, v in (tags or {}).items()]
        what = f"log to the run {run_id}"
        self._ask(what, lambda: self.client.log_batch(run_id, points, held, marks))

    def history(self, run_id: str, keys: Iterable[str]) -> dict[str, dict[int, float]]:
        """`{key: {step: value}}`, the newest value where a step has several."""
        points = self._ask(
            f"read the metrics of the run {run_id}",
            lambda: {key: self.client.get_metric_history(run_id, key) for key in keys},
        )
        ordered = {k: sorted(p, key=lambda point: int(point.timestamp)) for k, p in points.items()}
        return {k: {p.step: value_of(p.value) for p in some} for k, some in ordered.items()}

    def delete_tag(self, run_id: str, key: str) -> None:
        """Remove a tag; one that is not there is no error."""
        try:
            self._ask(f"delete the tag {key!r}", lambda: self.client.delete_tag(run_id, key))
        except NotInStoreError:
            log.debug("the run %s has no tag %r", run_id, key)

    # Artifacts on another machine, by MLflow's own repositories

    def artifacts(self, run_id: str, folder: str | None) -> list[tuple[str, bool]]:
        """`(path, is a folder)` of what lies directly in `folder`."""
        listed = self._ask("list artifacts", lambda: self.client.list_artifacts(run_id, folder))
        return [(a.path, a.is_dir) for a in listed]

    def upload(self, run_id: str, local: Path, folder: str | None) -> None:
        """A file, or what a folder holds, into the run's `folder`."""
        send = self.client.log_artifacts if local.is_dir() else self.client.log_artifact
        self._ask(f"store {local.name!r}", lambda: send(run_id, str(local), folder))

    def download(self, run_id: str, path: str, target: str | None) -> str:
        """Fetch a file or folder; the local path."""
        fetch = self.client.download_artifacts
        return str(self._ask(f"fetch {path!r}", lambda: fetch(run_id, path, target)))

    def remove(self, run_id: str, path: str) -> None:
        """Delete an artifact; TrackingError where the repository cannot."""
        client: Any = self.client._tracking_client
        what = f"delete {path!r}"
        self._ask(what, lambda: client._get_artifact_repo(run_id).delete_artifacts(path))


def start_monitor(uri: str, run_id: str, *, resumed: bool) -> Callable[[], None] | None:
    """MLflow's system metrics where its users switched them on; what ends them."""
    switch: Any = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    if not switch.get():
        return None
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        kind: Any = SystemMetricsMonitor
        monitor = kind(run_id, resume_logging=resumed, tracking_uri=uri)
        monitor.start()
    except Exception as error:
        log.warning("no system metrics are logged: %s", _first_line(error))
        return None
    finish: Callable[[], None] = monitor.finish
    return finish


def value_of(stored: float) -> float:
    """A metric's value from the store: MLflow keeps infinity as the largest float."""
    return math.copysign(math.inf, stored) if abs(stored) >= _INFINITE else stored


def _get_health(uri: str, timeout: float) -> None:
    """Any answer will do, with MLflow's own credentials and certificates."""
    creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    http_request(  # type: ignore[no-untyped-call]
        creds, "/health", "GET", max_retries=0, timeout=timeout, raise_on_status=False
    )


def _experiment_row(entity: Any) -> ExperimentRow:
    return ExperimentRow(
        str(entity.experiment_id), entity.name, entity.lifecycle_stage == "deleted"
    )


def _run_row(run: Any) -> RunRow:
    info, data = run.info, run.data
    return RunRow(
        id=info.run_id,
        name=info.run_name or data.tags.get("mlflow.runName", ""),
        experiment_id=str(info.experiment_id),
        status=info.status,
        start_time=info.start_time,
        end_time=info.end_time,
        artifact_uri=info.artifact_uri,
        deleted=info.lifecycle_stage == "deleted",
        metrics={k: value_of(v) for k, v in data.metrics.items()},
        params=dict(data.params),
        tags=dict(data.tags),
    )


def _pages(fetch: Callable[..., Any], limit: int = sys.maxsize) -> Iterator[Any]:
    token, left = None, limit
    while left > 0:
        page = fetch(page_token=token, max_results=min(left, PAGE))
        yield from page
        token, left = page.token, left - len(page)
        if not token:
            return


def _folder_name(name: str) -> str:
    """A folder for an experiment of any name: readable, and its own."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
    return f"{readable[:60]}-{sha256(f'{name}{time.time_ns()}'.encode()).hexdigest()[:6]}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _reason(error: BaseException) -> str:
    """What the system said, where a library wrapped it in sentences of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError | socket.gaierror) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return _first_line(error)


def _schema_name() -> str:
    """MLflow's version and its number of migrations: what a template file is good for."""
    folder = Path(mlflow.store.db_migrations.__path__[0], "versions")
    return f"{mlflow.__version__}-{len(list(folder.glob('*.py')))}"


def _migrate(path: Path) -> None:
    """Let MLflow build its tables in a file that nobody else sees."""
    noisy = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=f"sqlite:///{path}")
        client.search_experiments(max_results=1)
        client._tracking_client.store.engine.dispose()
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


_opened: weakref.WeakSet[MLflowStore] = weakref.WeakSet()


def _forget_connections() -> None:
    """A forked child must not use its parent's database connections."""
    global _stores_lock  # another thread may have held it at the fork
    _stores_lock = threading.Lock()
    for store in list(_opened):
        engine = getattr(store.client._tracking_client.store, "engine", None)
        if engine is not None:
            engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)
