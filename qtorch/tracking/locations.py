"""Where things of tracking lie: the store's URI, the user's cache, locks between processes."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qtorch.core.errors import TrackingError
from qtorch.core.files import cache_folder as cache_folder
from qtorch.core.session import session

SQLITE = "sqlite:///"
ALLOW_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
NAMED_STORES = ("databricks", "databricks-uc", "uc")  # MLflow's URIs that are bare words


def default_uri() -> str:
    """The tracking URI in force: `qtorch.init`'s, else MLFLOW_TRACKING_URI, else a sqlite file.

    That file is `mlruns/mlflow.db` under the working folder; artifacts lie beside it, in
    `mlruns/artifacts`.
    """
    given = session().tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return resolve_uri(given or f"{SQLITE}{Path('mlruns', 'mlflow.db').absolute()}")


def resolve_uri(uri: str | Path) -> str:
    """The URI with an absolute path, so that it means the same after a change of folder.

    Raises TrackingError for a bare folder: MLflow 3.13 and later refuse such stores.
    """
    text = str(uri).strip()
    path = sqlite_path(text)
    if path is not None:
        _, question, query = text.partition("?")
        return f"{SQLITE}{path}{question}{query}"
    scheme = urlsplit(text).scheme
    if text in NAMED_STORES:
        return text
    if scheme in ("", "file") and os.environ.get(ALLOW_FILE_STORE, "").lower() != "true":
        folder = Path(unquote(urlsplit(text).path) if scheme else text).expanduser().absolute()
        raise TrackingError(
            f"the tracking URI {text!r} is a folder of files, which MLflow no longer serves; write "
            f"'{SQLITE}{folder / 'mlflow.db'}' (`mlflow migrate-filestore` moves old runs over)."
        )
    return text


def sqlite_path(uri: str) -> Path | None:
    """The absolute file behind a sqlite URI; None for any other store, one in memory too."""
    if not uri.startswith(SQLITE):
        return None
    name = uri[len(SQLITE) :].partition("?")[0]
    if name in ("", ":memory:"):
        return None
    return Path(name).expanduser().absolute()


def redacted(uri: str) -> str:
    """The URI without its password: for logs, messages and what is kept on disk."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def local_folder(artifact_uri: str | None) -> Path | None:
    """The folder behind a run's artifact URI, None where it lies on another machine."""
    if not artifact_uri:
        return None
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(artifact_uri) if parts.scheme == "" else None


def outbox_folder() -> Path:
    """Where entries wait that no store has confirmed: QTORCH_OUTBOX, else in the cache folder."""
    given = os.environ.get("QTORCH_OUTBOX")
    return Path(given).expanduser() if given else cache_folder() / "outbox"


@contextmanager
def file_lock(path: Path, *, timeout: float = 120.0) -> Iterator[None]:
    """Hold the lock file `path` against every other process (flock; freed when one dies).

    Raises TrackingError after `timeout` seconds, and where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise TrackingError(f"cannot lock {path}: {error}") from error
    try:
        end = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TrackingError(
                        f"another process has held {path} for {timeout:.0f} s; end it or wait."
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)
