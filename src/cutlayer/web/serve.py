"""An application on a socket: uvicorn in a thread of its own, and its end.

It answers nothing itself, and touches neither signals nor logging of the process.
"""

import asyncio
import socket
import ssl
import threading
import time
from typing import cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.web.settings import HttpSettings

__all__ = ["WebServer", "serve_app"]

_START_S = 30.0
_BUFFER_BYTES = 65_536


class WebServer:
    """An application that is being served."""

    def __init__(self, server: uvicorn.Server, listening: socket.socket, scheme: str) -> None:
        self._server = server
        self._socket = listening
        host, port = listening.getsockname()[:2]
        self.port: int = port
        """Where it listens."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{shown}:{self.port}"
        """Where a browser on this machine finds it."""
        self._thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True
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
        """Take no more calls; those in flight get the time that was agreed at the start."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def serve_app(
    app: FastAPI,
    settings: HttpSettings,
    *,
    max_connections: int = 64,
    grace_s: int = 2,
    stall_s: float = 30.0,
) -> WebServer:
    """Serve `app` where the settings say.

    Args:
        app: what answers.
        settings: address and TLS.
        max_connections: further ones get status 503.
        grace_s: seconds that calls in flight get at the end.
        stall_s: seconds for which a peer may read nothing of what waits for it, or take to ask.

    Raises:
        ConfigError: the address is taken, or the TLS files are unusable.
    """
    config = _config(app, settings, stall_s)
    config.limit_concurrency = max_connections
    config.timeout_graceful_shutdown = grace_s
    scheme = "http" if settings.tls is None else "https"
    served = WebServer(uvicorn.Server(config), _listen(settings), scheme)
    served.start()
    return served


def _impatient(stall_s: float) -> type[H11Protocol]:
    """A connection that is cut where its peer reads nothing, or has no request to make; uvicorn
    itself would wait for ever, and who waits takes a place, with or without a token."""

    class Impatient(H11Protocol):
        _cut: asyncio.TimerHandle | None = None
        _idle: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            transport.set_write_buffer_limits(high=_BUFFER_BYTES)
            super().connection_made(transport)
            self._watch_idle()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget_idle()

        def on_response_complete(self) -> None:
            self._watch_idle()
            super().on_response_complete()
            if not self.cycle.response_complete:
                # The next request had come already.
                self._forget_idle()

        def pause_writing(self) -> None:
            self._cut = asyncio.get_running_loop().call_later(stall_s, self.transport.abort)
            super().pause_writing()

        def resume_writing(self) -> None:
            self._forget()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            self._forget_idle()
            super().connection_lost(exc)

        def _forget(self) -> None:
            if self._cut is not None:
                self._cut.cancel()

        def _watch_idle(self) -> None:
            self._forget_idle()
            self._idle = asyncio.get_running_loop().call_later(stall_s, self.transport.abort)

        def _forget_idle(self) -> None:
            if self._idle is not None:
                self._idle.cancel()

    return Impatient


def _config(app: FastAPI, settings: HttpSettings, stall_s: float) -> uvicorn.Config:
    tls, name = settings.tls, settings.section
    config = uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", _impatient(stall_s)),
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=None if tls is None else tls.certificate,
        ssl_keyfile=None if tls is None else str(tls.key),
        # An encrypted key would otherwise ask for its password on the terminal.
        ssl_keyfile_password=" ",
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{name}.tls: {tls and tls.certificate} and {tls and tls.key} are not a certificate "
            f"and its unencrypted key in PEM form: {error}"
        ) from error
    return config


def _listen(settings: HttpSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        # Python adds the address once more.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ConfigError(
            f"cannot listen on {settings.section}.address {settings.address}: {reason}; "
            "choose another"
        ) from error
    # Connections inherit it: an unread answer is then noticed before it is megabytes.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    return listening
