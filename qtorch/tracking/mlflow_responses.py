"""Checks of every response of a tracking server, and limits of its time.

While a server is away, a proxy in front of it often answers: with a login or maintenance page of
status 200, an empty body, a redirect or an endless stream. MLflow's client takes an empty body for
success, such a page for the confirmation of an upload, and its bytes for the downloaded artifact.
It also retries for minutes, or for as long as a `Retry-After` header says. So the one function
that sends MLflow's HTTP requests is replaced here. Requests to other hosts are passed on unchanged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from mlflow.utils import rest_utils

log = logging.getLogger(__name__)

ARTIFACTS = "/mlflow-artifacts/"
TEXT_PAGES = ("/health", "/version", "/server-info")  # pages that need not be JSON
MAX_RETRIES, MAX_BACKOFF = 2, 1  # of a request; the sender's own retries come after longer pauses
# A response may take MLflow's timeout (MLFLOW_HTTP_REQUEST_TIMEOUT) and the time for its bytes.
MIN_BYTES_PER_SECOND = 10_000
MAX_JSON_BYTES = 1 << 28
CHUNK_BYTES = 1 << 16
_SNIPPET = 80  # characters of a foreign page in a message

_servers: set[str] = set()
_SENDER = "_get_http_response_with_retries"  # of `rest_utils`; it sends each of MLflow's requests
_send_request: Callable[..., Any] | None = getattr(rest_utils, _SENDER, None)


class ForeignResponseError(OSError):
    """The response does not come from the tracking server, or is not complete."""


def check_responses(uri: str) -> None:
    """Check each response of the tracking server at `uri` from now on."""
    _servers.add(uri.rstrip("/") + "/")


def _request(
    method: str, url: str, max_retries: int, backoff_factor: float, *policy: Any, **options: Any
) -> Any:
    """Send a request for MLflow; raise ForeignResponseError unless the server itself answers."""
    assert _send_request is not None
    is_checked = url.startswith(tuple(_servers)) or ARTIFACTS in url
    if not is_checked:
        return _send_request(method, url, max_retries, backoff_factor, *policy, **options)
    is_stream = options.get("stream", False)
    limits = {"stream": True, "respect_retry_after_header": False}
    retries = min(max_retries, MAX_RETRIES), min(backoff_factor, MAX_BACKOFF)
    response = _send_request(method, url, *retries, *policy, **{**options, **limits})
    seconds = float(options.get("timeout") or 120)
    if is_stream and method == "GET" and response.ok:
        _check_download(response)
        response.iter_content = lambda chunk_size=None, **_: _read(response, seconds)
        return response
    response._content = _read_body(response, seconds)
    response._content_consumed = True
    if not urlsplit(url).path.endswith(TEXT_PAGES):
        _check_json(method, response)
    return response


if _send_request is None:
    log.warning("this version of MLflow sends requests in another way: responses are not checked")
else:
    setattr(rest_utils, _SENDER, _request)


def _read(response: Any, seconds: float) -> Iterator[bytes]:
    """Yield the body as it arrives; raise if it is incomplete or arrives too slowly."""
    start, num_bytes = time.monotonic(), 0
    read = getattr(response.raw, "read1", response.raw.read)  # urllib3 1 has no read1
    try:
        while part := read(CHUNK_BYTES, decode_content=True):
            num_bytes += len(part)
            if time.monotonic() - start > seconds + num_bytes / MIN_BYTES_PER_SECOND:
                raise ForeignResponseError(
                    f"the response was not complete after {seconds:g} s ({num_bytes} bytes)"
                )
            yield part
    except BaseException:
        response.close()  # a connection with a rest of this body must not be used again
        raise
    response.raw.release_conn()


def _read_body(response: Any, seconds: float) -> bytes:
    parts, num_bytes = [], 0
    for part in _read(response, seconds):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > MAX_JSON_BYTES:
            response.close()
            raise ForeignResponseError(f"the response has more than {MAX_JSON_BYTES} bytes")
    return b"".join(parts)


def _check_json(method: str, response: Any) -> None:
    """Raise unless the response is a JSON object: MLflow answers nothing else, even for errors.

    Only an upload may have an empty response; `MLflowStore.upload` checks that it has arrived.
    """
    if response.request.method != method:  # the redirect turned it into a GET
        raise ForeignResponseError(f"the request was redirected to {_without_query(response.url)}")
    body = response.content.strip()
    is_upload = method == "PUT" and response.ok
    if not (body.startswith(b"{") and body.endswith(b"}")) and not (is_upload and not body):
        text = " ".join(body[: 4 * _SNIPPET].decode(errors="replace").split())[:_SNIPPET]
        raise ForeignResponseError(
            f"status {response.status_code} with {text!r} instead of MLflow's JSON (is there a "
            "proxy or a login page in front of the server?)"
        )


def _check_download(response: Any) -> None:
    """Raise unless the response is an artifact: MLflow sends each one as an attachment."""
    if "attachment" not in response.headers.get("Content-Disposition", ""):
        kind = response.headers.get("Content-Type", "unknown")
        response.close()
        raise ForeignResponseError(
            f"status {response.status_code} with a page ({kind}) instead of the artifact (is there "
            "a proxy or a login page in front of the server?)"
        )


def _without_query(url: str) -> str:
    return urlsplit(url)._replace(query="", fragment="").geturl()
