"""The client's end of a gRPC stream: many calls over one connection, deadlines, counters.

It does not reconnect: a broken channel fails every call, and whoever owns it opens another one and
says HELLO again. It does not read certificates' contents (`identity`).
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue

import grpc

from cutlayer.errors import CutlayerError, ProtocolError, TransportError
from cutlayer.wire.channel import settle
from cutlayer.wire.endpoints import ConnectionSettings, check_security, is_loopback, read_tls
from cutlayer.wire.frame import Frame, decode, encode, read_prelude
from cutlayer.wire.grpc_map import METHOD, OPENED, SERVICE, from_grpc, options
from cutlayer.wire.pinned import Pin
from cutlayer.wire.stream import Assembler, chunks
from cutlayer.wire.tls_probe import tls_refusal

__all__ = ["GrpcChannel"]

_TICK_S = 0.1
_CLOSE_S = 1.0
_PAUSE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class _Call:
    frame: Frame
    future: Future[Frame]
    deadline_s: float
    started_s: float


class GrpcChannel:
    """A connection to one server. Futures are completed on the channel's own reading thread:
    callbacks on them must be short, and must not wait for another call."""

    def __init__(self, settings: ConnectionSettings, pin: Pin | None = None) -> None:
        """Connect, repeating refused attempts until `connect_timeout_s`.

        Args:
            settings: address, tls files and limits.
            pin: accept this server certificate alone; None accepts the authority's.

        Raises:
            ConfigError: insecure settings or unusable tls files.
            PermissionRefused: one side does not accept the other's certificate.
            TransportError: nobody answers.
        """
        check_security(settings)
        self.bytes_sent = 0
        self.bytes_received = 0
        self._settings, self._pin = settings, pin
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(settings.max_in_flight)
        self._pending: dict[int, _Call] = {}
        self._last_id = 0
        self._progress_s = time.monotonic()
        self._broken: CutlayerError | None = None
        self._stopped = threading.Event()
        self._grpc = _open(settings, pin)
        self._outgoing, self._stream = self._connect()
        self._reader = self._start(self._receive, "receive")
        self._start(self._watch, "watch")

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """Send a frame; blocks only while `max_in_flight` calls are unanswered.

        Args:
            frame: what to send; its `call_id` is replaced.
            deadline_s: seconds without one byte sent or received until the call fails; None takes
                the settings' value.
        """
        future: Future[Frame] = Future()
        future.set_running_or_notify_cancel()
        limit_s = self._settings.deadline_s if deadline_s is None else deadline_s
        if not self._slots.acquire(timeout=limit_s):
            future.set_exception(self._late(limit_s))
            return future
        call = _Call(frame=frame, future=future, deadline_s=limit_s, started_s=time.monotonic())
        with self._lock:
            broken = self._broken
            if broken is None:
                self._last_id += 1
                self._pending[self._last_id] = call
                self._outgoing.put(self._last_id)
        if broken is not None:
            self._finish(call, broken)
        return future

    def close(self) -> None:
        """End the connection; calls in flight fail with TransportError."""
        is_idle = not self._pending
        self._break(TransportError("the channel was closed"))
        if is_idle and threading.current_thread() is not self._reader:
            self._reader.join(_CLOSE_S)
        self._stream.cancel()
        self._grpc.close()

    def _connect(self) -> tuple[SimpleQueue[int | None], grpc.Call]:
        give_up_s = time.monotonic() + self._settings.connect_timeout_s
        start = self._grpc.stream_stream(f"/{SERVICE}/{METHOD}")
        last: CutlayerError | None = None
        while True:
            outgoing: SimpleQueue[int | None] = SimpleQueue()
            stream = start(self._send(outgoing))
            error = self._refusal(stream, give_up_s)
            if error is None:
                return outgoing, stream
            outgoing.put(None)
            is_late = time.monotonic() >= give_up_s
            # the first reason says more than that time ran out
            last = last if is_late and last is not None else error
            if is_late or not isinstance(error, TransportError):
                self._grpc.close()
                raise last
            time.sleep(_PAUSE_S)

    def _refusal(self, stream: grpc.Call, give_up_s: float) -> CutlayerError | None:
        """Wait until the server accepts the stream; else the error with which it ended."""
        alarm = threading.Timer(max(give_up_s - time.monotonic(), 0.0), stream.cancel)
        alarm.daemon = True
        alarm.start()
        try:
            if OPENED in {tuple(pair) for pair in stream.initial_metadata() or ()}:
                return None
            if stream.code() is grpc.StatusCode.CANCELLED:
                timeout_s = self._settings.connect_timeout_s
                return TransportError(f"{self._settings.address} did not answer in {timeout_s:g} s")
            error = from_grpc(stream, self._settings.address)
        finally:
            alarm.cancel()
        if self._settings.tls is None or not isinstance(error, TransportError):
            return error
        left_s = max(give_up_s - time.monotonic(), _PAUSE_S)
        return tls_refusal(self._settings, left_s, self._pin) or error

    def _start(self, target: Callable[[], None], name: str) -> threading.Thread:
        name = f"cutlayer-{name}-{self._settings.address}"
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        return thread

    def _send(self, outgoing: SimpleQueue[int | None]) -> Iterator[bytes]:
        """Chunks of the waiting calls, drawn by gRPC's sending thread as the link takes them."""
        while (call_id := outgoing.get()) is not None:
            with self._lock:
                call = self._pending.get(call_id)
            if call is None:
                continue
            for chunk in chunks(encode(replace(call.frame, call_id=call_id))):
                self.bytes_sent += len(chunk)
                yield chunk
                self._progress_s = time.monotonic()

    def _receive(self) -> None:
        assembler = Assembler(self._settings.limits)
        error: CutlayerError = TransportError(f"{self._settings.address} ended the connection")
        try:
            for chunk in self._stream:
                self._progress_s = time.monotonic()
                self.bytes_received += len(chunk)
                for data in assembler.feed(chunk):
                    self._answer(data)
        except grpc.RpcError as theirs:
            error = from_grpc(theirs, self._settings.address)
        except CutlayerError as ours:
            error = ours
            self._stream.cancel()
        finally:
            self._break(error)

    def _answer(self, data: memoryview) -> None:
        call_id = read_prelude(data, self._settings.limits).call_id
        with self._lock:
            call = self._pending.get(call_id)
            was_asked = 1 <= call_id <= self._last_id
        if not was_asked:
            raise ProtocolError(f"reply to call {call_id}, which was never made")
        if call is None:  # its deadline has passed
            return
        reply = decode(data, self._settings.limits, call.frame)
        with self._lock:
            is_awaited = self._pending.pop(call_id, None) is not None
        if is_awaited:
            self._slots.release()
            settle(call.future, reply)

    def _watch(self) -> None:
        while not self._stopped.wait(_TICK_S):
            now_s = time.monotonic()
            with self._lock:
                late = [
                    call_id
                    for call_id, call in self._pending.items()
                    if now_s - max(call.started_s, self._progress_s) > call.deadline_s
                ]
                calls = [self._pending.pop(call_id) for call_id in late]
            for call in calls:
                self._finish(call, self._late(call.deadline_s))

    def _late(self, deadline_s: float) -> TransportError:
        return TransportError(
            f"{self._settings.address}: no byte moved for {deadline_s:g} s; the server hangs, is "
            "overloaded or cannot be reached (connection.deadline_s)"
        )

    def _break(self, error: CutlayerError) -> None:
        with self._lock:
            self._broken = self._broken or error
            calls = list(self._pending.values())
            self._pending.clear()
        self._stopped.set()
        self._outgoing.put(None)
        for call in calls:
            self._finish(call, error)

    def _finish(self, call: _Call, error: CutlayerError) -> None:
        self._slots.release()
        # a fresh exception for each caller: tracebacks are written into it
        call.future.set_exception(type(error)(*error.args))


def _open(settings: ConnectionSettings, pin: Pin | None) -> grpc.Channel:
    arguments: list[tuple[str, int | str]] = [
        *options(settings),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", round(settings.connect_timeout_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.enable_http_proxy", 0 if is_loopback(settings.address) else 1),
    ]
    if settings.tls is None:
        return grpc.insecure_channel(settings.address, options=arguments)
    name = settings.server_name if pin is None else pin.name
    if name is not None:
        arguments.append(("grpc.ssl_target_name_override", name))
    key, certificate, authority = read_tls(settings.tls)
    authority = authority if pin is None else pin.certificate
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(settings.address, credentials, options=arguments)
