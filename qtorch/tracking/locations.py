"""Where tracking data lies: store URI, artifact folder, outbox, claim files."""

from __future__ import annotations

import os
import shlex
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qtorch.core.errors import TrackingError
from qtorch.core.files import cache_folder
from qtorch.core.secrets import check_complete, check_encoding, redact_urls
from qtorch.core.session import resolve_path, session

SQLITE = "sqlite:///"
ARTIFACTS = "artifacts"  # the folder beside a store's file, and that of each run in it
LOCAL_PORT = 5000
LOCAL_SERVER = f"http://127.0.0.1:{LOCAL_PORT}"
ALLOW_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
NAMED_STORES = ("databricks", "databricks-uc", "uc")  # MLflow's URIs that are bare words


def default_uri() -> str:
    """Return the default tracking URI: from `qtorch.init`, MLFLOW_TRACKING_URI, or a sqlite file.

    That file is `mlruns/mlflow.db` in the working folder; its artifacts are in
    `mlruns/artifacts`.
    """
    uri = session().tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return resolve_uri(uri or f"{SQLITE}{resolve_path('mlruns/mlflow.db')}")


def resolve_uri(uri: str | Path) -> str:
    """Make a URI valid in this process: its path absolute, its password in it.

    A URI that was stored without its password gets it from this process's configuration. Raises
    TrackingError if it is not there, and for a bare folder: MLflow 3.13 and later reject such
    stores.
    """
    text = check_complete(str(uri).strip(), "MLFLOW_TRACKING_URI or tracking.uri", TrackingError)
    check_encoding(text, TrackingError)
    path = sqlite_path(text)
    if path is not None:
        _, question, query = text.partition("?")
        return f"{SQLITE}{path}{question}{query}"
    scheme = urlsplit(text).scheme
    if text in NAMED_STORES:
        return text
    if scheme in ("", "file") and os.environ.get(ALLOW_FILE_STORE, "").lower() != "true":
        folder = resolve_path(unquote(urlsplit(text).path) if scheme else text)
        raise TrackingError(
            f"the tracking URI {text!r} is a folder, which MLflow no longer supports as a store; "
            f"use '{SQLITE}{folder / 'mlflow.db'}' (`mlflow migrate-filestore` moves old runs)."
        )
    return text


def replace_folder(uri: str) -> str:
    """Return the URI of the sqlite file in a folder that MLflow used as a store; other URIs as is.

    That is `mlflow.db` in it. Qlib's own stores are such folders.
    """
    scheme = urlsplit(uri).scheme
    if scheme not in ("", "file") or uri in NAMED_STORES:
        return uri
    folder = resolve_path(unquote(urlsplit(uri).path) if scheme else uri)
    return f"{SQLITE}{folder / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite URI's file; None for another store or one in memory."""
    if not uri.startswith(SQLITE):
        return None
    name = uri[len(SQLITE) :].partition("?")[0]
    if name in ("", ":memory:"):
        return None
    return resolve_path(name)


def find_artifacts(uri: str, artifact_uri: str) -> str:
    """Return where a run's artifacts lie now: beside the store's file, also after both were moved.

    MLflow stores absolute paths. `<old>/artifacts/<experiment>/<run>/artifacts` is replaced by the
    same place beside the store's file, if it exists there, or if the old folder is gone, or has a
    store of the same name (this one is its copy). Other places, which a user has chosen, stay.
    """
    store, folder = sqlite_path(uri), local_folder(artifact_uri)
    if store is None or folder is None or folder.parts[-4::3] != (ARTIFACTS, ARTIFACTS):
        return artifact_uri
    old_root = folder.parents[3]
    if old_root == store.parent:
        return artifact_uri
    moved = store.parent.joinpath(*folder.parts[-4:])
    is_moved = moved.exists() or not old_root.exists() or (old_root / store.name).exists()
    return str(moved) if is_moved else artifact_uri


def server_command(uri: str) -> str | None:
    """Return the command that shows a local store at LOCAL_SERVER; None for a server's address."""
    if uri.startswith(("http://", "https://")):
        return None
    store = shlex.quote(redact_urls(uri))
    return f"mlflow server --backend-store-uri {store} --port {LOCAL_PORT} --workers 1"


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run's page with its curves, for a local store on LOCAL_SERVER.

    The page of an experiment opens on traces in MLflow 3, which a training has none of.
    """
    server = redact_urls(uri) if uri.startswith(("http://", "https://")) else LOCAL_SERVER
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}/model-metrics"


def local_folder(artifact_uri: str | None) -> Path | None:
    """Return the local folder of a run's artifact URI, None if it is on another machine."""
    if not artifact_uri:
        return None
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(artifact_uri) if parts.scheme == "" else None


def outbox_folder() -> Path:
    """Return the folder for unconfirmed entries: QTORCH_OUTBOX, else one in the cache folder."""
    folder = os.environ.get("QTORCH_OUTBOX")
    return resolve_path(folder) if folder else cache_folder() / "outbox"


def claims_folder(tracking_uri: str) -> Path:
    """Return the folder of the claim files (`qtorch.process.lease`) of a store's jobs and runs.

    It lies beside a local store, else in the user's cache folder, which the nodes of a cluster
    share with the home folder (as they share the checkpoints).
    """
    uri = resolve_uri(tracking_uri)
    path = sqlite_path(uri)
    if path is not None:
        return path.parent / "claims"
    return cache_folder() / "claims" / sha256(redact_urls(uri).encode()).hexdigest()[:16]
