"""A proxy in front of an MLflow server that misbehaves on demand."""

from __future__ import annotations

import socket
import struct
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!doctype html><html><body>Please log in</body></html>"


class Proxy:
    """A proxy in front of a server on localhost; `mode` says how it treats requests from now on.

    Some modes leave the health page alone, as a proxy may that knows only some paths.
    """

    MODES = (
        "silence",  # the connection is reset, the server gets nothing
        "page",  # a page of status 200
        "page_but_healthy",
        "empty_but_healthy",
        "error_404_but_healthy",  # pages of status 404 and 400
        "bad_request_but_healthy",
        "redirect_but_healthy",  # to a login page
        "busy",  # status 503, Retry-After
        "busy_but_healthy",
        "half_but_healthy",  # the response of the server, without its end
        "reset_but_healthy",  # the server gets the request, but its response is lost
        "endless_but_healthy",  # a response that never ends
    )

    def __init__(self, port: int) -> None:
        proxy = self
        assert all(hasattr(self, f"_send_{mode.partition('_but_')[0]}") for mode in self.MODES)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_request(self):
                proxy._handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request

        class QuietServer(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self._target_port = port
        self.mode, self.seconds = "forward", 0.0
        self.requests: list[str] = []  # method and path of each one
        self.is_swallowing = False  # uploads get an empty response, as the server's, and are lost
        self._server = QuietServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.mode = "silence"
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append(f"{request.command} {request.path}")
        mode, _, rest = self.mode.partition("_but_")
        if rest and request.path == "/health":
            mode = "forward"
        if self.is_swallowing and request.command == "PUT":
            mode = "empty"
        time.sleep(self.seconds)
        getattr(self, f"_send_{mode}")(request, body)

    def _respond(self, request, status=200, body=PAGE, length=None, **headers) -> None:
        request.send_response(status)
        headers = {"Content-Type": "text/html", **headers}
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        request.wfile.write(body)

    def _ask_server(self, request, body):
        connection = HTTPConnection("127.0.0.1", self._target_port, timeout=60)
        headers = {k: v for k, v in request.headers.items() if k.lower() != "host"}
        connection.request(request.command, request.path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        skipped = ("content-length", "transfer-encoding", "connection", "date", "server")
        headers = {k: v for k, v in response.getheaders() if k.lower() not in skipped}
        return response.status, content, headers

    def _send_forward(self, request, body) -> None:
        status, content, headers = self._ask_server(request, body)
        self._respond(request, status, content, **headers)

    def _send_silence(self, request, _) -> None:
        # Without lingering, closing the connection resets it.
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.close_connection = True
        request.connection.close()

    def _send_reset(self, request, body) -> None:
        self._ask_server(request, body)
        self._send_silence(request, body)

    def _send_page(self, request, _) -> None:
        self._respond(request)

    def _send_empty(self, request, _) -> None:
        self._respond(request, body=b"")

    def _send_error_404(self, request, _) -> None:
        self._respond(request, 404)

    def _send_bad_request(self, request, _) -> None:
        self._respond(request, 400)

    def _send_redirect(self, request, _) -> None:
        if request.path.startswith("/login"):
            self._respond(request)
        else:
            self._respond(request, 302, Location=f"{self.uri}/login?next=secret")

    def _send_busy(self, request, _) -> None:
        self._respond(request, 503, Retry_After="3600")

    def _send_half(self, request, body) -> None:
        status, content, headers = self._ask_server(request, body)
        half = content[: len(content) // 2]
        self._respond(request, status, half, length=len(content) + 1, **headers)
        request.close_connection = True

    def _send_endless(self, request, _) -> None:
        self._respond(request, body=b"{", length=1 << 30, Content_Type="application/json")
        while self.mode.startswith("endless"):
            request.wfile.write(b" ")
            time.sleep(0.05)
        request.close_connection = True
