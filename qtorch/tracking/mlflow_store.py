"""The MLflow client: one of the three modules that import MLflow, see `DOORS` in test_rules.py.

Everything goes through a client of one tracking URI; MLflow's global tracking URI and active run
are neither read nor set here. MLflow's environment variables (credentials, timeouts, system
metrics) apply.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mlflow.store.db_migrations
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.rest_utils import http_request

from qtorch.core.errors import TrackingError
from qtorch.core.files import cache_folder, file_lock
from qtorch.core.lazy import quick_imports
from qtorch.core.secrets import redact_error, redact_urls
from qtorch.tracking.locations import ARTIFACTS, find_artifacts, resolve_uri, sqlite_path
from qtorch.tracking.mlflow_responses import check_responses
from qtorch.tracking.store_types import (
    AlreadyInStoreError,
    ExperimentRow,
    MetricPoint,
    NotInStoreError,
    RefusedError,
    RunRow,
    artifact_paths,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

PAGE, MAX_RUNS = 1000, 100_000  # results per request, and of a search by default
SQLITE_BUSY_SECONDS = 20.0
TIMEOUT_VARIABLE = "QTORCH_TRACKING_TIMEOUT"
HTTP = ("http", "https")
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
BUSY_CODES = (408, 429)  # HTTP: request timeout, too many requests
LOCKED_ATTEMPTS, _LOCKED = 5, "database is locked"
_ERROR_CLASSES: dict[str, type[TrackingError]] = {
    "RESOURCE_DOES_NOT_EXIST": NotInStoreError,
    "RESOURCE_ALREADY_EXISTS": AlreadyInStoreError,
    "INVALID_PARAMETER_VALUE": RefusedError,
}
_STORED_INFINITY = sys.float_info.max  # MLflow stores infinity as this value

_stores: dict[tuple[int, str], MLflowStore] = {}
_stores_lock = threading.Lock()


def open_store(uri: str) -> MLflowStore:
    """Return the store of a tracking URI, opened once per process.

    Raises TrackingError within seconds if the store does not answer.
    """
    full_uri = resolve_uri(uri)
    key = (os.getpid(), full_uri)
    with _stores_lock:
        if key not in _stores:
            _stores[key] = MLflowStore(full_uri)
        return _stores[key]


def _forget_connections() -> None:
    """Drop inherited database connections: a forked child must not use its parent's."""
    global _stores_lock  # another thread may have held the lock at the fork
    _stores_lock = threading.Lock()
    for store in _stores.values():
        engine = getattr(store.client._tracking_client.store, "engine", None)
        if engine is not None:
            engine.dispose(close=False)


os.register_at_fork(after_in_child=_forget_connections)


class MLflowStore:
    """Experiments, runs and artifacts of one tracking URI; raises qtorch's own errors."""

    def __init__(self, uri: str) -> None:
        self.uri = resolve_uri(uri)
        if urlsplit(self.uri).scheme in HTTP:
            check_responses(self.uri)
        self.client = self._call("open", self._open_client)

    def _open_client(self) -> MlflowClient:
        path = sqlite_path(self.uri)
        if path is not None:
            _ensure_sqlite_store(path)
            with quick_imports():  # MLflow imports its database store only now
                return MlflowClient(tracking_uri=self.uri)
        # The first client that opens a server's new database migrates it, so take turns.
        name = sha256(redact_urls(self.uri).encode()).hexdigest()[:16]
        with file_lock(cache_folder() / f"open-{name}.lock"):
            client = MlflowClient(tracking_uri=self.uri)
            client.search_experiments(max_results=1)
            return client

    def check_answers(self) -> None:
        """Raise TrackingError if the server does not answer.

        It has QTORCH_TRACKING_TIMEOUT seconds (10). A request to a server that is away takes
        longer, so this check runs before each of them.
        """
        parts = urlsplit(self.uri)
        port = DATABASE_PORTS.get(parts.scheme.split("+")[0])
        timeout = float(os.environ.get(TIMEOUT_VARIABLE, "10"))
        try:
            if parts.scheme in HTTP:
                _get_health(self.uri, timeout)
            elif port and parts.hostname and "," not in parts.hostname:
                address = (parts.hostname, parts.port or port)
                socket.create_connection(address, timeout=timeout).close()
        except (MlflowException, OSError, ValueError) as error:
            redact_error(error)
            raise TrackingError(
                f"the tracking server {redact_urls(self.uri)} does not answer ({_reason(error)}"
                "). Start it, or use another tracking URI."
            ) from error

    def _call(self, action: str, request: Callable[[], T]) -> T:
        """Send a request and return its result; raise MLflow's errors as qtorch's own.

        Retries if other processes lock a sqlite file for longer than MLflow waits.
        """
        self.check_answers()
        for attempt in range(LOCKED_ATTEMPTS):
            try:
                return request()
            except TrackingError:
                raise
            except Exception as error:
                if _LOCKED in str(error) and attempt + 1 < LOCKED_ATTEMPTS:
                    log.debug("could not %s: the database is locked", action)
                    time.sleep(random.uniform(0.05, 0.5))
                    continue
                redact_error(error)
                code = str(getattr(error, "error_code", ""))
                raise _ERROR_CLASSES.get(code, TrackingError)(
                    f"could not {action} at {redact_urls(self.uri)}: {_first_line(error)}"
                ) from error
        raise AssertionError("the last attempt returns or raises")

    # Experiments

    def experiment(self, *, id: str | None = None, name: str | None = None) -> ExperimentRow | None:
        """Return an experiment, including a deleted one; None if there is none."""
        action = f"read the experiment {name or id!r}"
        client = self.client
        try:
            if id is not None:
                entity: Any = self._call(action, lambda: client.get_experiment(str(id)))
            else:
                entity = self._call(action, lambda: client.get_experiment_by_name(name or ""))
        except (NotInStoreError, RefusedError):
            return None
        return None if entity is None else _experiment_row(entity)

    def create_experiment(self, name: str) -> ExperimentRow:
        """Create an experiment; AlreadyInStoreError if the name exists, even as a deleted one."""
        path = sqlite_path(self.uri)
        folder = None if path is None else str(path.parent / ARTIFACTS / _folder_name(name))
        new_id = self._call(
            f"create the experiment {name!r}",
            lambda: self.client.create_experiment(name, artifact_location=folder),
        )
        return ExperimentRow(str(new_id), name)

    def experiments(self) -> list[ExperimentRow]:
        """Return all experiments that are not deleted."""
        entities = self._call(
            "list the experiments", lambda: list(_pages(self.client.search_experiments))
        )
        return [_experiment_row(e) for e in entities]

    def delete_experiment(self, id: str) -> None:
        """Mark an experiment as deleted; `mlflow gc` removes it for good."""
        self._call(f"delete the experiment {id}", lambda: self.client.delete_experiment(id))

    # Runs

    def create_run(
        self, experiment_id: str, name: str | None, tags: Mapping[str, str], start_time: int
    ) -> RunRow:
        """Create a run with the status RUNNING."""
        run = self._call(
            "create a run",
            lambda: self.client.create_run(
                experiment_id, start_time=start_time, tags=dict(tags), run_name=name
            ),
        )
        return self._run_row(run)

    def run(self, run_id: str) -> RunRow:
        """Return a run; NotInStoreError if there is none."""
        try:
            run = self._call(f"read run {run_id}", lambda: self.client.get_run(run_id))
            return self._run_row(run)
        except RefusedError as error:
            raise NotInStoreError(str(error)) from error

    def set_status(self, run_id: str, status: str, end_time: int | None = None) -> None:
        """Set a final status with its end time, or RUNNING without one."""
        action = f"set the run {run_id} to {status}"
        if end_time is None:
            self._call(action, lambda: self.client.update_run(run_id, status=status))
        else:
            # Not `set_terminated`, which prints the address of the run with its password.
            store, number = self.client._tracking_client.store, RunStatus.from_string(status)
            self._call(action, lambda: store.update_run_info(run_id, number, end_time, None))

    def delete_run(self, run_id: str) -> None:
        """Mark a run as deleted."""
        self._call(f"delete the run {run_id}", lambda: self.client.delete_run(run_id))

    def runs(
        self,
        experiment_ids: Sequence[str],
        *,
        filter_string: str | None = None,
        run_view_type: int | None = None,
        max_results: int | None = None,
        order_by: Sequence[str] | None = None,
    ) -> list[RunRow]:
        """Search runs with MLflow's filter syntax; the newest first unless `order_by` is given.

        By default runs that are not deleted, at most 100,000.
        """

        def page(page_token: str | None, max_results: int) -> Any:
            return self.client.search_runs(
                list(experiment_ids),
                filter_string or "",
                run_view_type or 1,
                max_results,
                list(order_by) if order_by else None,
                page_token,
            )

        limit = MAX_RUNS if max_results is None else max_results
        entities = self._call("search the runs", lambda: list(_pages(page, limit)))
        return [self._run_row(run) for run in entities]

    def _run_row(self, run: Any) -> RunRow:
        info, data = run.info, run.data
        return RunRow(
            id=info.run_id,
            name=info.run_name or data.tags.get("mlflow.runName", ""),
            experiment_id=str(info.experiment_id),
            status=info.status,
            start_time=info.start_time,
            end_time=info.end_time,
            artifact_uri=find_artifacts(self.uri, info.artifact_uri),
            is_deleted=info.lifecycle_stage == "deleted",
            metrics={k: _metric_value(v) for k, v in data.metrics.items()},
            params=dict(data.params),
            tags=dict(data.tags),
        )

    # Logging

    def log_batch(
        self,
        run_id: str,
        metrics: Iterable[MetricPoint] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log at most 1000 metrics, 100 params and 100 tags in one request: all or none.

        A metric with the same step, time and value is not stored twice.
        """
        entities = (
            [Metric(m.key, m.value, m.time, m.step) for m in metrics],
            [Param(k, v) for k, v in (params or {}).items()],
            [RunTag(k, v) for k, v in (tags or {}).items()],
        )
        self._call(f"log to the run {run_id}", lambda: self.client.log_batch(run_id, *entities))

    def rename_run(self, run_id: str, name: str) -> None:
        """Change the name of a run."""
        self._call(f"rename the run {run_id}", lambda: self.client.update_run(run_id, name=name))

    def log_input(
        self, run_id: str, name: str, digest: str, source: str, profile: str, context: str
    ) -> None:
        """Log a dataset as an input of a run."""
        dataset = Dataset(name, digest, "local", source, profile=profile)
        inputs = [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])]
        self._call(
            f"log the dataset of the run {run_id}", lambda: self.client.log_inputs(run_id, inputs)
        )

    def history(self, run_id: str, keys: Iterable[str]) -> dict[str, dict[int, float]]:
        """Return `{key: {step: value}}`; of several values of a step the newest."""
        points = self._call(
            f"read the metrics of the run {run_id}",
            lambda: {key: self.client.get_metric_history(run_id, key) for key in keys},
        )
        return {
            key: {p.step: _metric_value(p.value) for p in sorted(history, key=_timestamp)}
            for key, history in points.items()
        }

    def delete_tag(self, run_id: str, key: str) -> None:
        """Delete a tag; a missing tag is not an error."""
        try:
            self._call(f"delete the tag {key!r}", lambda: self.client.delete_tag(run_id, key))
        except NotInStoreError:
            log.debug("the run %s has no tag %r", run_id, key)

    # Artifacts on another machine, through MLflow's own artifact repositories

    def artifacts(self, run_id: str, folder: str | None) -> list[tuple[str, bool]]:
        """List `folder` (not recursively) as pairs `(path, is_folder)`."""
        entities = self._call("list artifacts", lambda: self.client.list_artifacts(run_id, folder))
        return [(a.path, a.is_dir) for a in entities]

    def upload(
        self, run_id: str, local: Path, folder: str | None, replaces: Collection[str] = ()
    ) -> None:
        """Upload a file, or the content of a folder, into the run's `folder`.

        `replaces` are paths of artifacts in `folder` that are removed before, if they exist.
        """
        client: Any = self.client._tracking_client
        log_files = self.client.log_artifacts if local.is_dir() else self.client.log_artifact

        def send() -> None:
            repository = client._get_artifact_repo(run_id)
            if replaces:
                for path in {a.path for a in repository.list_artifacts(folder)} & set(replaces):
                    repository.delete_artifacts(path)
            log_files(run_id, str(local), folder)
            # Such a server's response to an upload is empty, as that of a proxy may be. MLflow's
            # clients of object stores check their uploads themselves.
            if isinstance(repository, HttpArtifactRepository):
                self._check_upload(repository, artifact_paths(local, folder))

        self._call(f"store {local.name!r}", send)

    def _check_upload(self, repository: Any, files: Mapping[str, Path]) -> None:
        """Raise TrackingError unless the files have arrived with their sizes."""
        for parent in {PurePosixPath(path).parent for path in files}:
            listing = repository.list_artifacts(str(parent) if parent.name else None)
            sizes = {a.path: a.file_size for a in listing}
            for path, local in files.items():
                if PurePosixPath(path).parent != parent or local.name == parent.name:
                    continue  # MLflow lists a folder "a" with a single file "a" as empty
                if sizes.get(path) != local.stat().st_size:
                    raise TrackingError(
                        f"could not store {path!r} at {redact_urls(self.uri)}: the server "
                        f"confirmed it, but lists it with {sizes.get(path)} bytes instead of "
                        f"{local.stat().st_size} (is there a proxy in front of the server?)."
                    )

    def download(self, run_id: str, path: str, target: str | None) -> str:
        """Download a file or folder and return its local path."""
        fetch = self.client.download_artifacts
        return str(self._call(f"fetch {path!r}", lambda: fetch(run_id, path, target)))

    def remove(self, run_id: str, path: str) -> None:
        """Delete an artifact; TrackingError if the artifact repository cannot delete."""
        client: Any = self.client._tracking_client
        action = f"delete {path!r}"
        self._call(action, lambda: client._get_artifact_repo(run_id).delete_artifacts(path))


def start_system_monitor(uri: str, run_id: str, *, is_resumed: bool) -> Callable[[], None] | None:
    """Start MLflow's system metrics if its setting enables them; return the function that stops."""
    switch: Any = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    if not switch.get():
        return None
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor_class: Any = SystemMetricsMonitor
        monitor = monitor_class(run_id, resume_logging=is_resumed, tracking_uri=uri)
        monitor.start()
    except Exception as error:
        log.warning("could not start system metrics: %s", _first_line(error))
        return None
    finish: Callable[[], None] = monitor.finish
    return finish


def _metric_value(stored_value: float) -> float:
    """Convert a stored metric value: MLflow stores infinity as the largest float."""
    if abs(stored_value) >= _STORED_INFINITY:
        return math.copysign(math.inf, stored_value)
    return stored_value


def _timestamp(metric: Any) -> int:
    return int(metric.timestamp)


def _get_health(uri: str, timeout: float) -> None:
    """Request the health page with MLflow's credentials.

    Any response means that the server is up, except the errors of a proxy or a busy server. Whether
    the server itself responds to a request, `mlflow_responses` checks for each one.
    """
    creds = get_default_host_creds(uri)  # type: ignore[no-untyped-call]
    response = http_request(  # type: ignore[no-untyped-call]
        creds, "/health", "GET", max_retries=0, timeout=timeout, raise_on_status=False
    )
    if response.status_code >= 500 or response.status_code in BUSY_CODES:
        raise OSError(f"status {response.status_code}")


def _experiment_row(entity: Any) -> ExperimentRow:
    return ExperimentRow(
        str(entity.experiment_id), entity.name, entity.lifecycle_stage == "deleted"
    )


def _pages(fetch: Callable[..., Any], limit: int = sys.maxsize) -> Iterator[Any]:
    token, num_left = None, limit
    while num_left > 0:
        page = fetch(page_token=token, max_results=min(num_left, PAGE))
        yield from page
        token, num_left = page.token, num_left - len(page)
        if not token:
            return


def _folder_name(name: str) -> str:
    """Return a readable, unique folder name for an experiment with any name."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in name)
    return f"{readable[:60]}-{sha256(f'{name}{time.time_ns()}'.encode()).hexdigest()[:6]}"


def _first_line(error: BaseException) -> str:
    text = redact_urls(str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__


def _reason(error: BaseException) -> str:
    """Return the operating system's message inside a library's error, else its first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError | socket.gaierror) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return _first_line(error)


def _ensure_sqlite_store(path: Path) -> None:
    """Create a store at `path` unless there is one; many processes may call this at once.

    MLflow takes seconds to create its tables, so they are created once in a template in the cache
    folder, and copied.
    """
    try:
        if _has_tables(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(path.name + ".lock")):
            if _has_tables(path):
                return
            if path.exists() and path.stat().st_size:
                _migrate(path)  # another program's tables, or a store left incomplete
            else:
                _build_store(path)
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"the tracking store {path} cannot be opened or created: {error}. Use a file that can "
            "be written, or another tracking URI."
        ) from error


def _has_tables(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with closing(sqlite3.connect(path, timeout=SQLITE_BUSY_SECONDS)) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        if not {"alembic_version", "experiments", "runs"} <= {name for (name,) in rows}:
            return False
        default_experiment = connection.execute("SELECT 1 FROM experiments WHERE experiment_id = 0")
        return default_experiment.fetchone() is not None


def _build_store(path: Path) -> None:
    for leftover in path.parent.glob(f".{path.name}.init-*"):
        leftover.unlink(missing_ok=True)  # left by a process that was killed during the creation
    fresh = path.with_name(f".{path.name}.init-{os.getpid()}")
    template = cache_folder() / f"mlflow-{_schema_name()}.db"
    try:
        if not _copy_template(template, fresh):
            log.info("creating the tracking store %s (once; takes some seconds)", path)
            _migrate(fresh)
            _save_template(fresh, template)
        _move_default_experiment(fresh, path.parent / ARTIFACTS / "Default")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _copy_template(template: Path, fresh: Path) -> bool:
    """Copy the template; return False, and remove the template, if it is missing or damaged."""
    if not template.exists():
        return False
    try:
        shutil.copyfile(template, fresh)
        with closing(sqlite3.connect(fresh)) as connection:
            is_intact = connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
        if is_intact and _has_tables(fresh):
            return True
    except (OSError, sqlite3.Error) as error:
        log.debug("the template %s cannot be used: %s", template, error)
    fresh.unlink(missing_ok=True)
    template.unlink(missing_ok=True)
    return False


def _save_template(fresh: Path, template: Path) -> None:
    partial = template.with_name(f".{template.name}.{os.getpid()}")
    try:
        template.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh, partial)
        os.replace(partial, template)
    except OSError as error:
        partial.unlink(missing_ok=True)
        log.debug("the template of the store could not be saved to %s: %s", template.parent, error)


def _move_default_experiment(fresh: Path, artifacts: Path) -> None:
    with closing(sqlite3.connect(fresh)) as connection, connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = ?, creation_time = CAST(strftime('%s') AS "
            "INTEGER) * 1000, last_update_time = CAST(strftime('%s') AS INTEGER) * 1000",
            (str(artifacts),),
        )


def _schema_name() -> str:
    """Return MLflow's version and number of migrations, which identify a template file."""
    folder = Path(mlflow.store.db_migrations.__path__[0], "versions")
    return f"{mlflow.__version__}-{len(list(folder.glob('*.py')))}"


def _migrate(path: Path) -> None:
    """Let MLflow create its tables in a file that no other process uses yet."""
    loggers = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=f"sqlite:///{path}")
        client.search_experiments(max_results=1)
        client._tracking_client.store.engine.dispose()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
