"""One link to a server: handshake, calls in flight, reconnecting and repeating what is open.

It does not know what a call means, compute, or decide what to do about an answer.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from cutlayer.errors import CutlayerError, ProtocolError, TransportError
from cutlayer.model.agreement import agree
from cutlayer.model.manifest import Manifest
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import decode
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import Hello, Kind, Welcome
from cutlayer.wire.packed import Packed
from cutlayer.wire.spec import Spec, compare

__all__ = ["Connect", "Link", "OwnModel", "PendingCall", "header_of"]

H = TypeVar("H", bound=Header)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0

Connect = Callable[[str | None], Channel]
"""Opens a fresh channel: to the server that the settings name, or to a replica's host:port."""


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

    def __init__(self, link: "Link", frame: Frame, future: "Future[Frame]") -> None:
        self.frame = frame
        self.future = future
        self._link = link

    def result(self) -> Frame:
        """The reply.

        Raises:
            TransportError: the server stayed away longer than `reconnect_s`.
            CutlayerError: what the server answered.
        """
        return self._link._wait(self)

    def forget(self) -> None:
        """Nobody waits for it any more: it is not repeated."""
        self._link._forget(self)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the reply, decoded."""
        reply = self.result()
        with self._link._named():
            if name not in reply.tensors:
                raise ProtocolError(f"{reply.kind.name} came without tensor {name!r}")
            (sent,) = self.frame.tensors.values()
            found = reply.tensors[name]
            if found.shape != sent.shape:
                raise ProtocolError(
                    f"{reply.kind.name} has shape {found.shape}, sent was {sent.shape}"
                )
            return decode(found).float()


class Link:
    """One connection at a time; used from one thread.

    A server with replicas answers HELLO with the place of one: the link then goes there, and asks
    anew after a lost connection.
    """

    def __init__(
        self, connect: Connect, model: OwnModel, reconnect_s: float = 60.0, follows: bool = True
    ) -> None:
        """
        Args:
            connect: opens a channel.
            model: what to claim and compare.
            reconnect_s: how long a lost server may stay away without progress.
            follows: go to the replica that the server names; calls of a federation do not.
        """
        self._connect = connect
        self._model = model
        self._reconnect_s = reconnect_s
        self._follows = follows
        self.peer: str | None = None
        """Who is at the other end, for errors, where there are several."""
        self.on_welcome: Callable[[Welcome], None] = lambda welcome: None
        """Shown every handshake; what it raises refuses the server."""
        self._channel: Channel | None = None
        self._open_calls: list[PendingCall] = []
        self._interrupted = threading.Event()
        self._bytes_sent = self._bytes_received = 0

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent, over all connections."""
        channel = self._channel  # another thread may ask while it is dropped
        return self._bytes_sent + (channel.bytes_sent if channel else 0)

    @property
    def bytes_received(self) -> int:
        """Bytes of frames received, over all connections."""
        channel = self._channel
        return self._bytes_received + (channel.bytes_received if channel else 0)

    def hello(self) -> Welcome:
        """Connect and compare specs.

        Raises:
            SpecMismatch: the sides describe different models, cuts or formats.
            TransportError: no server within `reconnect_s`.
        """
        with self._named():
            return self._retry_until_connected(time.monotonic() + self._reconnect_s)

    @property
    def is_connected(self) -> bool:
        """Whether a channel is open; it may be lost without anybody having noticed."""
        return self._channel is not None

    def claim(self, model: OwnModel) -> None:
        """Claim another cut from now on, over a new connection; bytes are counted on."""
        self.close()
        self._model = model

    def forget_calls(self) -> None:
        """No call that is open now is repeated any more."""
        self._open_calls.clear()

    def interrupt(self) -> None:
        """Whoever waits for the server fails with TransportError now; any thread may call it."""
        self._interrupted.set()
        channel = self._channel
        if channel is not None:
            channel.close()

    def resume(self) -> None:
        """Wait for servers again after an interruption."""
        self._interrupted.clear()

    def call_once(self, frame: Frame, deadline_s: float) -> "Future[Frame]":
        """A call that is not repeated, on an open channel."""
        assert self._channel is not None
        return self._channel.call(frame, deadline_s)

    def close(self) -> None:
        """End the connection."""
        self._open_calls.clear()
        self._drop_channel()

    def send(
        self, kind: Kind, header: Header, tensors: Mapping[str, Packed] | None = None
    ) -> PendingCall:
        """Start a call; it is repeated after a lost connection, in order with the others."""
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
        with self._named():
            return self._answer(call)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors say which peer it was, once."""
        try:
            yield
        except CutlayerError as error:
            if self.peer is not None and not str(error).startswith(self.peer):
                error.args = (f"{self.peer}: {error}",)
            raise

    def _answer(self, call: PendingCall) -> Frame:
        deadline_s = None
        try:
            while True:
                try:
                    return call.future.result()
                except TransportError:
                    now_s = time.monotonic()
                    deadline_s = now_s + self._reconnect_s if deadline_s is None else deadline_s
                    if now_s >= deadline_s or call not in self._open_calls:
                        raise
                    self._repeat_open_calls(deadline_s)
        finally:
            # However it ended: a call that was given up must not be repeated upon later ones.
            self._forget(call)

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
                is_late = time.monotonic() + wait_s > deadline_s
                if is_late or self._interrupted.wait(wait_s):
                    self._drop_channel()
                    raise
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _handshake(self) -> Welcome:
        welcome = self._open(None)
        if welcome.place and self._follows:
            self._drop_channel()
            welcome = self._open(welcome.place)
        return welcome

    def _open(self, place: str | None) -> Welcome:
        self._channel = self._connect(place)
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
        welcome = header_of(reply, Welcome)
        compare(self._model.spec, Spec.from_table(welcome.spec))
        agree(self._model.manifest, welcome.leaves, self._model.digest)
        self.on_welcome(welcome)
        return welcome

    def _drop_channel(self) -> None:
        if self._channel is None:
            return
        self._bytes_sent += self._channel.bytes_sent
        self._bytes_received += self._channel.bytes_received
        self._channel.close()
        self._channel = None


def header_of(frame: Frame, kind: type[H]) -> H:
    """The header of a reply.

    Raises:
        ProtocolError: the reply is of another kind.
    """
    if not isinstance(frame.header, kind):
        raise ProtocolError(f"the server answered {frame.kind.name}, expected {kind.__name__}")
    return frame.header
