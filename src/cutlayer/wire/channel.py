"""Channels: how a client calls a server with frames, and what a server has to offer for that.

It does not know sockets (`grpc_channel`, `grpc_listener`) nor what a frame means. The loopback
channel joins both sides in one process and still encodes and decodes every frame.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from cutlayer.errors import (
    CacheFull,
    CutlayerError,
    SessionLost,
    TransportError,
    error_from_code,
)
from cutlayer.wire.frame import Frame, FrameLimits, decode, encode, is_like_call
from cutlayer.wire.messages import Failed, Kind

__all__ = [
    "Channel",
    "Connection",
    "LoopbackChannel",
    "Peer",
    "Service",
    "error_of",
    "failed_frame",
    "reply_frame",
    "settle",
    "submit",
]

_log = logging.getLogger(__name__)
_MAX_MESSAGE_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Who is at the other end, as its certificate says."""

    name: str
    roles: frozenset[str]
    serial: int | None
    """Serial number of the certificate; None where there is none (plaintext on loopback)."""
    address: str
    """Network address, for logs."""
    tls_key_sha256: bytes = b""
    """SHA-256 of its TLS key's SubjectPublicKeyInfo; empty where there is no certificate."""


class Channel(Protocol):
    """The client's side of a connection to one server. Thread-safe."""

    @property
    def bytes_sent(self) -> int:
        """Bytes of all frames sent so far."""

    @property
    def bytes_received(self) -> int:
        """Bytes of all frames received so far."""

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """Send a frame; the future gives the reply, or raises the error that the peer reported.

        Several calls may be in flight. The channel sets the frame's `call_id`.

        Args:
            frame: what to send.
            deadline_s: seconds without any progress of the channel until the call fails with
                TransportError; None takes the channel's default.
        """

    def close(self) -> None:
        """End the connection; calls in flight fail with TransportError."""


class Connection(Protocol):
    """The server's side of one connection; lives until `close`."""

    def submit(self, frame: Frame) -> Future[Frame]:
        """Start a call; its future gives the reply or raises a `CutlayerError`."""

    def close(self) -> None:
        """The peer has gone; called exactly once."""


class Service(Protocol):
    """What a server offers to every peer."""

    def connect(self, peer: Peer) -> Connection:
        """Accept a peer.

        Raises:
            PermissionRefused: the peer may not use this service.
        """


class LoopbackChannel:
    """A channel to a service in the same process; every frame is really encoded and decoded."""

    def __init__(self, service: Service, peer: Peer, limits: FrameLimits | None = None) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._limits = limits or FrameLimits()
        self._connection = service.connect(peer)
        self._lock = threading.Lock()
        self._last_id = 0
        self._is_open = True

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """Submit the frame to the service. There is no link to lose, so no deadline runs."""
        future: Future[Frame] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._last_id += 1
            call_id = self._last_id
        if not self._is_open:
            future.set_exception(TransportError("the channel is closed"))
            return future
        try:
            arrived, num_bytes = self._through_wire(replace(frame, call_id=call_id))
        except CutlayerError as error:
            future.set_exception(error)
            return future
        with self._lock:
            self.bytes_sent += num_bytes
        submit(self._connection, arrived, lambda reply: self._receive(reply, frame, future))
        return future

    def close(self) -> None:
        """Tell the service that the peer has gone."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._connection.close()

    def _receive(self, reply: Frame, call: Frame, future: Future[Frame]) -> None:
        try:
            arrived, num_bytes = self._through_wire(reply, call)
        except CutlayerError as error:
            future.set_exception(error)
            return
        with self._lock:
            self.bytes_received += num_bytes
        settle(future, arrived)

    def _through_wire(self, frame: Frame, call: Frame | None = None) -> tuple[Frame, int]:
        # one writable copy, as a socket would make: decoded tensors must not alias the sender's
        data = bytearray().join(encode(frame))
        return decode(data, self._limits, call), len(data)


def submit(connection: Connection, frame: Frame, send: Callable[[Frame], None]) -> None:
    """Start a call at the service; `send` gets the reply or a FAILED frame, on whichever thread."""
    try:
        future = connection.submit(frame)
    except CutlayerError as error:
        send(failed_frame(frame, error))
        return
    future.add_done_callback(lambda done: send(reply_frame(frame, done)))


def reply_frame(call: Frame, done: Future[Frame]) -> Frame:
    """The frame that answers `call`, once its future is done."""
    if done.cancelled():
        return failed_frame(call, TransportError("the server dropped the call"))
    error = done.exception()
    if error is None:
        reply = done.result()
        is_like = is_like_call(reply, call)
        return replace(reply, call_id=call.call_id, version=call.version, is_like_call=is_like)
    if not isinstance(error, CutlayerError):
        _log.error("call %s failed inside the server", call.kind.name, exc_info=error)
        error = CutlayerError("the server failed inside; its log says why")
    return failed_frame(call, error)


def failed_frame(call: Frame, error: CutlayerError) -> Frame:
    """The FAILED frame that carries `error` to the caller."""
    retry_after_s = getattr(error, "retry_after_s", None)
    lost_rows = list(error.lost_rows) if isinstance(error, SessionLost) else []
    failed = Failed(
        code=type(error).__name__,
        message=str(error),
        retry_after_s=retry_after_s,
        lost_rows=lost_rows,
    )
    return Frame(Kind.FAILED, failed, call_id=call.call_id, version=call.version)


def error_of(failed: Failed) -> CutlayerError:
    """The exception that a FAILED frame names; its text cannot steer a terminal."""
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in failed.message)
    if failed.retry_after_s is not None:
        text = f"{text}; ask again in {failed.retry_after_s:g} s"
    error = error_from_code(failed.code[:80], text[:_MAX_MESSAGE_CHARS])
    if isinstance(error, SessionLost):
        error.lost_rows = tuple(failed.lost_rows)
    elif isinstance(error, CacheFull):
        error.retry_after_s = failed.retry_after_s
    return error


def settle(future: Future[Frame], reply: Frame) -> None:
    """Give a reply to the caller: a FAILED frame is raised from the future."""
    if isinstance(reply.header, Failed):
        future.set_exception(error_of(reply.header))
    else:
        future.set_result(reply)
