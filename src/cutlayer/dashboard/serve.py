"""The page's HTTP server: a socket, uvicorn in a thread of its own, and its end.

It answers nothing itself (`app`), and touches neither signals nor logging of the process.
"""

import socket
import ssl
import threading
import time
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from cutlayer.dashboard.app import create_app
from cutlayer.dashboard.auth import Gate, ensure_token
from cutlayer.dashboard.view import ServerView
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.server.http_settings import HttpSettings

__all__ = ["Dashboard", "start_dashboard"]

_START_S = 30.0
_GRACE_S = 2
_MAX_CONNECTIONS = 64


class Dashboard:
    """A page that is being served."""

    def __init__(
        self, server: uvicorn.Server, listening: socket.socket, scheme: str, token_file: Path
    ) -> None:
        self._server = server
        self._socket = listening
        host, port = listening.getsockname()[:2]
        self.port: int = port
        """Where it listens."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{shown}:{self.port}"
        """Where a browser on this machine finds it."""
        self.token_file = token_file
        """Who may read it may look at the page."""
        self._thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, name="page", daemon=True
        )

    def start(self) -> None:
        """Answer in a thread of its own; returns when it does."""
        self._thread.start()
        deadline_s = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline_s:
                raise CutlayerError(f"the page at {self.url} did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop answering; calls in flight get two seconds."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def start_dashboard(view: ServerView, settings: HttpSettings, state_folder: Path) -> Dashboard:
    """Serve the page of `view`; a missing token file is made.

    Raises:
        ConfigError: the address is taken, the token is too short, or the TLS files are unusable.
        StorageError: the token file is readable by others, or cannot be written.
    """
    token_file = settings.token_file or state_folder / "http.token"
    gate = Gate(ensure_token(token_file), settings.login_s, time.time)
    server = uvicorn.Server(_config(create_app(view, gate, settings.is_encrypted), settings))
    scheme = "http" if settings.tls is None else "https"
    dashboard = Dashboard(server, _listen(settings), scheme, token_file)
    dashboard.start()
    return dashboard


def _config(app: FastAPI, settings: HttpSettings) -> uvicorn.Config:
    tls = settings.tls
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else str(tls.key),
        # An encrypted key would otherwise ask for its password on the terminal.
        ssl_keyfile_password=" ",
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"http.tls: {tls and tls.certificate} and {tls and tls.key} are not a certificate and "
            f"its unencrypted key in PEM form: {error}"
        ) from error
    return config


def _listen(settings: HttpSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        # Python adds the address once more.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ConfigError(
            f"cannot listen on http.address {settings.address}: {reason}; choose another"
        ) from error
