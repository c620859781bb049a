"""The trunk as the client sees it: calls over a channel that reconnects and repeats what is open.

Only `Released` tensors can be sent. It does not compute, save or decide what to do when the
server has lost a step or a session: those errors reach the caller.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from cutlayer.errors import ProtocolError, SessionLost, TransportError
from cutlayer.model.adapters import AdapterState
from cutlayer.model.agreement import agree
from cutlayer.model.manifest import Manifest
from cutlayer.privacy.boundary import Released
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import decode
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import (
    Backward,
    BackwardDone,
    CloseSession,
    Commit,
    Committed,
    Decode,
    Forward,
    Header,
    Hello,
    Kind,
    OpenRun,
    OpenSession,
    PullAdapter,
    RunOpened,
    SessionOpened,
    Step,
    Welcome,
)
from cutlayer.wire.packed import Packed
from cutlayer.wire.spec import Spec, compare

__all__ = ["OwnModel", "PendingCall", "RemoteTrunk", "trunk_sq_norm"]

H = TypeVar("H", bound=Header)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_CLOSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class OwnModel:
    """What the client believes and tells in the handshake."""

    spec: Spec
    manifest: Manifest
    """What the client recomputed of its own parts, and what its manifest file says."""
    digest: str | None
    """Model digest that the owner pinned."""


class PendingCall:
    """A call in flight; `result` waits, and repeats it after a lost connection."""

    def __init__(self, trunk: "RemoteTrunk", frame: Frame, future: "Future[Frame]") -> None:
        self.frame = frame
        self.future = future
        self._trunk = trunk

    def result(self) -> Frame:
        """The reply.

        Raises:
            TransportError: the server stayed away longer than `reconnect_s`.
            CutlayerError: what the server answered.
        """
        return self._trunk._wait(self)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the reply, decoded."""
        reply = self.result()
        if name not in reply.tensors:
            raise ProtocolError(f"{reply.kind.name} came without tensor {name!r}")
        (sent,) = self.frame.tensors.values()
        if reply.tensors[name].shape != sent.shape:
            raise ProtocolError(
                f"{reply.kind.name} has shape {reply.tensors[name].shape}, sent was {sent.shape}"
            )
        return decode(reply.tensors[name]).float()


class RemoteTrunk:
    """One connection at a time; used from one thread."""

    def __init__(
        self, connect: Callable[[], Channel], model: OwnModel, reconnect_s: float = 60.0
    ) -> None:
        """Args:
        connect: opens a fresh channel.
        model: what to claim and compare.
        reconnect_s: how long a lost server may stay away without progress.
        """
        self._connect = connect
        self._model = model
        self._reconnect_s = reconnect_s
        self._channel: Channel | None = None
        self._open_calls: list[PendingCall] = []
        self._bytes_sent = self._bytes_received = 0

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent, over all connections."""
        return self._bytes_sent + (self._channel.bytes_sent if self._channel else 0)

    @property
    def bytes_received(self) -> int:
        """Bytes of frames received, over all connections."""
        return self._bytes_received + (self._channel.bytes_received if self._channel else 0)

    def hello(self) -> Welcome:
        """Connect and compare specs.

        Raises:
            SpecMismatch: the sides describe different models, cuts or formats.
            TransportError: no server within `reconnect_s`.
        """
        return self._retry_until_connected(time.monotonic() + self._reconnect_s)

    def open_run(self, call: OpenRun) -> int:
        """The newest step that both sides have, where the run now stands."""
        self._open_calls.clear()
        return _header(self._send(Kind.OPEN_RUN, call).result(), RunOpened).step

    def forward(self, released: Released, call: Forward) -> PendingCall:
        """Send a micro-batch up; the reply's tensor `y` is [N, D]."""
        return self._send(Kind.FORWARD, call, {"h": released.packed})

    def backward(self, released: Released, call: Backward) -> PendingCall:
        """Send a gradient up; the reply's tensor `grad` is [N, D] where the head trains."""
        return self._send(Kind.BACKWARD, call, {"grad": released.packed})

    def save(self, run_id: str, step: int, finished: Step | None, pin: bool) -> None:
        """Have the server finish `step`, if that is pending, and make it durable."""
        call = Commit(run_id=run_id, commit=finished, save=True, step=step, pin=pin)
        saved = _header(self._send(Kind.COMMIT, call).result(), Committed).step
        if saved != step:
            raise ProtocolError(f"the server saved step {saved} where {step} was asked for")

    def pull_adapter(self, run_id: str, step: int) -> AdapterState:
        """The trunk adapter of a saved step of one's own run."""
        reply = self._send(Kind.PULL_ADAPTER, PullAdapter(run_id=run_id, step=step)).result()
        return {name: decode(packed).clone() for name, packed in reply.tensors.items()}

    def open_session(self, max_lengths: Sequence[int], run_id: str | None, step: int | None) -> str:
        """Reserve KV cache for rows of at most `max_lengths` tokens; the session's name."""
        call = OpenSession(max_lengths=list(max_lengths), run_id=run_id, step=step)
        return _header(self._send(Kind.OPEN_SESSION, call).result(), SessionOpened).session_id

    def decode(self, released: Released, session_id: str, rows: Sequence[int]) -> Tensor:
        """Trunk output [N, D] of released vectors of some rows, after what is cached of them."""
        call = Decode(
            session_id=session_id,
            rows=list(rows),
            lengths=list(released.rows.lengths),
            positions=list(released.rows.starts),
        )
        return self._send(Kind.DECODE, call, {"h": released.packed}).tensor("y")

    def close_session(self, session_id: str) -> None:
        """Give the cache back, if the server is there; else its time to live does."""
        if self._channel is None:
            return
        frame = Frame(kind=Kind.CLOSE_SESSION, header=CloseSession(session_id=session_id))
        with suppress(TransportError, SessionLost):
            self._channel.call(frame, _CLOSE_S).result()

    def close(self) -> None:
        """End the connection."""
        self._open_calls.clear()
        self._drop_channel()

    def _send(
        self, kind: Kind, header: Header, tensors: Mapping[str, Packed] | None = None
    ) -> PendingCall:
        if self._channel is None:
            self.hello()
        call = PendingCall(self, Frame(kind=kind, header=header, tensors=tensors or {}), Future())
        self._open_calls.append(call)
        call.future = self._start(call.frame)
        return call

    def _start(self, frame: Frame) -> "Future[Frame]":
        assert self._channel is not None
        try:
            return self._channel.call(frame)
        except TransportError as error:
            failed: Future[Frame] = Future()
            failed.set_exception(error)
            return failed

    def _wait(self, call: PendingCall) -> Frame:
        deadline_s = None
        while True:
            try:
                reply = call.future.result()
                break
            except TransportError:
                now_s = time.monotonic()
                deadline_s = now_s + self._reconnect_s if deadline_s is None else deadline_s
                if now_s >= deadline_s or call not in self._open_calls:
                    raise
                self._repeat_open_calls(deadline_s)
            except BaseException:
                self._forget(call)
                raise
        self._forget(call)
        return reply

    def _forget(self, call: PendingCall) -> None:
        if call in self._open_calls:
            self._open_calls.remove(call)

    def _repeat_open_calls(self, deadline_s: float) -> None:
        # In their first order: the server's sums, and so its bits, depend on it.
        self._retry_until_connected(deadline_s)
        for call in self._open_calls:
            call.future = self._start(call.frame)

    def _retry_until_connected(self, deadline_s: float) -> Welcome:
        wait_s = _FIRST_WAIT_S
        while True:
            self._drop_channel()
            try:
                return self._handshake()
            except TransportError:
                if time.monotonic() + wait_s > deadline_s:
                    self._drop_channel()
                    raise
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _handshake(self) -> Welcome:
        self._channel = self._connect()
        try:
            return self._greet(self._channel)
        except BaseException:
            # A server that was refused must not get the next call.
            self._drop_channel()
            raise

    def _greet(self, channel: Channel) -> Welcome:
        hello = Hello(
            nonce=secrets.token_hex(32),
            spec=self._model.spec.to_table(),
            leaves=dict(self._model.manifest.leaves),
        )
        reply = channel.call(Frame(kind=Kind.HELLO, header=hello)).result()
        welcome = _header(reply, Welcome)
        compare(self._model.spec, Spec.from_table(welcome.spec))
        agree(self._model.manifest, welcome.leaves, self._model.digest)
        return welcome

    def _drop_channel(self) -> None:
        if self._channel is None:
            return
        self._bytes_sent += self._channel.bytes_sent
        self._bytes_received += self._channel.bytes_received
        self._channel.close()
        self._channel = None


def _header(frame: Frame, kind: type[H]) -> H:
    if not isinstance(frame.header, kind):
        raise ProtocolError(f"the server answered {frame.kind.name}, expected {kind.__name__}")
    return frame.header


def trunk_sq_norm(reply: Frame) -> float:
    """The trunk's squared gradient norm from the reply to a step's last BACKWARD."""
    norm = _header(reply, BackwardDone).trunk_sq_norm
    if norm is None or not 0 <= norm < float("inf"):
        raise ProtocolError(f"the server sent the squared norm {norm}; a finite one is needed")
    return norm
