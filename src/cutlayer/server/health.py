"""/healthz, /readyz and /metrics over HTTP on loopback. It changes nothing and tells no content."""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cutlayer.errors import ConfigError

__all__ = ["HealthServer"]


class HealthServer:
    """For the operator's supervisor and Prometheus; bind a proxy in front for other machines."""

    def __init__(
        self, port: int, is_ready: Callable[[], bool], metrics: Callable[[], bytes]
    ) -> None:
        """Listen on 127.0.0.1; port 0 picks one.

        Raises:
            ConfigError: the port is taken.
        """
        try:
            self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(is_ready, metrics))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on health_port {port}: {error.strerror}; choose another"
            ) from error
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._http.server_address[1])

    def start(self) -> None:
        """Answer in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering."""
        self._http.shutdown()
        self._http.server_close()


def _handler(
    is_ready: Callable[[], bool], metrics: Callable[[], bytes]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/healthz":
                self._answer(HTTPStatus.OK, b"ok\n")
            elif self.path == "/readyz":
                ready = is_ready()
                status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
                self._answer(status, b"ready\n" if ready else b"not ready\n")
            elif self.path == "/metrics":
                self._answer(HTTPStatus.OK, metrics())
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"try /healthz, /readyz or /metrics\n")

        def log_message(self, format: str, *args: object) -> None:
            return

        def _answer(self, status: HTTPStatus, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
