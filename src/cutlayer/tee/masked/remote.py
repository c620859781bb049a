"""Workers of a masked part as it sees them: over a socket, doubted in everything that they send.

It does not mask, draw pads or check products (`linear`). A connection is made at the first use and
again after it broke, after a fork and after a snapshot: two copies of this process must not share
one. A worker that came back without its layers cannot be used: the weights are not kept here.

Shapes: N = tokens, K = inputs and M = products of a direction.
"""

import socket
from collections.abc import Callable

from torch import Tensor

from cutlayer.errors import ConfigError, PeerMisbehaved, ProtocolError, TransportError
from cutlayer.tee.masked.address import connect
from cutlayer.tee.masked.dealer_key import Asking
from cutlayer.tee.masked.framing import Frame, FrameKind, FrameSocket
from cutlayer.tee.masked.pads import Seeds, watch_forks
from cutlayer.tee.masked.quantise import FieldWeight
from cutlayer.tee.masked.worker_messages import (
    VERSION,
    Failed,
    Hello,
    Layout,
    Role,
    from_hex,
    layer_key,
    layout_of,
    read,
    tensor_bytes,
    tensor_of,
    told,
)

__all__ = ["RemoteAccelerator", "RemoteDealing", "WorkerLink", "check_apart"]

_UPLOAD_BYTES = 1 << 24


class WorkerLink:
    """One worker, and the layers that it was given."""

    def __init__(
        self,
        address: str,
        role: Role,
        timeout_s: float,
        dealer_key: str | None = None,
        seeds: Seeds | None = None,
        open_: Callable[[str, float], socket.socket] = connect,
    ) -> None:
        """
        Args:
            address: `unix:PATH` or `HOST:PORT`.
            role: what must answer there.
            timeout_s: silence that counts as gone.
            dealer_key: public key in hex that a dealer must hold.
            seeds: tells when this process was copied; None makes its own.
            open_: opens a connection.
        """
        self.peer = f"{role} {address}"
        self._address, self._role, self._timeout_s = address, role, timeout_s
        self._dealer_key, self._open = dealer_key, open_
        self._seeds = seeds or Seeds()
        self._epoch = self._seeds.epoch
        self._wire: FrameSocket | None = None
        self._keys: dict[str, tuple[str, Layout]] = {}
        self._number = self._received = 0
        watch_forks(self)

    def after_fork(self) -> None:
        """In the child: the parent goes on with the connection."""
        if self._wire is not None:
            self._wire.drop()
            self._wire = None

    def hello(self) -> Hello:
        """Connect, and what the worker says of itself.

        Raises:
            ConfigError: it is of another kind.
            TransportError: nobody answers.
            ProtocolError: it is no worker, or does not hold the dealer's key.
        """
        wire = FrameSocket(self._open(self._address, self._timeout_s), self.peer, self._timeout_s)
        try:
            hello = self._greet(wire)
        except BaseException:
            wire.close()
            raise
        self._wire, self._epoch = wire, self._seeds.current_epoch()
        return hello

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Give it a layer, unless it has it."""
        layout, raw = layout_of(weight), tensor_bytes(weight.limbs_LOI)
        key = layer_key(layout, raw)
        if not self._announce(key, layout):
            for start in range(0, len(raw), _UPLOAD_BYTES):
                body = raw[start : start + _UPLOAD_BYTES]
                self.call(Frame(kind=FrameKind.ROWS, name=key, body=body))
        self._keys[name] = (key, layout)

    def key(self, name: str) -> str:
        """What the worker calls a layer."""
        return self._keys[name][0]

    def width(self, name: str, transpose: bool) -> int:
        """Products per token that it must return."""
        layout = self._keys[name][1]
        inputs, outputs = layout.inputs, layout.outputs
        if transpose:
            return layout.limbs * -(-outputs // layout.backward_block) * inputs
        return layout.limbs * -(-inputs // layout.forward_block) * outputs

    def call(self, frame: Frame) -> Frame:
        """Ask and wait.

        Raises:
            TransportError, ProtocolError: as `send` and `receive`.
        """
        return self.receive(self.send(frame))

    def send(self, frame: Frame) -> int:
        """Ask; the number of the question.

        Raises:
            TransportError: it is gone, or came back without its layers.
        """
        wire = self._connected()
        self._number += 1
        numbered = Frame(
            kind=frame.kind,
            number=self._number,
            name=frame.name,
            transpose=frame.transpose,
            rows=frame.rows,
            columns=frame.columns,
            body=frame.body,
        )
        with self._closing_on_failure():
            wire.send(numbered)
        return self._number

    def receive(self, number: int) -> Frame:
        """The answer to a question; answers to earlier ones, which nobody waits for, are skipped.

        Raises:
            ProtocolError: it refuses, or breaks the format.
            TransportError: it is gone or silent.
        """
        if self._wire is None:
            raise TransportError(f"the connection to {self.peer} broke before it answered")
        with self._closing_on_failure():
            frame = self._wire.receive()
            # Each question has one answer: who repeats an old one without end is not waited for.
            while frame is not None and self._received < frame.number < number:
                self._received = frame.number
                frame = self._wire.receive()
            if frame is None:
                raise TransportError(f"{self.peer} closed the connection; look at its own log")
            if frame.number != number:
                raise ProtocolError(f"{self.peer} answered question {frame.number}, not {number}")
            self._received = number
        if frame.kind is FrameKind.FAILED:
            raise self._refusal(frame)
        return frame

    def close(self) -> None:
        """Close the connection."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def _connected(self) -> FrameSocket:
        if self._wire is not None and self._seeds.current_epoch() != self._epoch:
            # Another copy of this process may go on with the same connection and its keys.
            self._wire.drop()
            self._wire = None
        if self._wire is None:
            self.hello()
            for key, layout in self._keys.values():
                if not self._announce(key, layout):
                    self.close()
                    raise TransportError(
                        f"{self.peer} was restarted and no longer has the layers; restart this "
                        "side, which gives them to it"
                    )
        assert self._wire is not None
        return self._wire

    def _announce(self, key: str, layout: Layout) -> bool:
        body = told(layout)
        answer = self.call(Frame(kind=FrameKind.HOLD, name=key, body=body))
        return answer.rows == 1

    def _greet(self, wire: FrameSocket) -> Hello:
        asking: Asking | None = None
        if self._dealer_key is not None:
            # Two copies of this machine may draw alike from OpenSSL, never from the seeds.
            asking = Asking(self._dealer_key, self._seeds.draw())
        ephemeral = "" if asking is None else asking.public.hex()
        own = Hello(version=VERSION, role=self._role, ephemeral=ephemeral)
        wire.send(Frame(kind=FrameKind.HELLO, body=told(own)))
        hello = self._read_hello(wire)
        if asking is not None:
            wire.seal(*asking.keys(from_hex(hello.ephemeral)))
            hello = self._read_hello(wire)
        return hello

    def _read_hello(self, wire: FrameSocket) -> Hello:
        frame = wire.receive()
        if frame is None or frame.kind not in (FrameKind.HELLO, FrameKind.FAILED):
            raise ProtocolError(f"{self.peer} closed the connection instead of a hello")
        if frame.kind is FrameKind.FAILED:
            raise self._refusal(frame)
        hello = read(frame, Hello, self.peer)
        if hello.role != self._role:
            raise ConfigError(
                f"{self._address} is a worker with role {hello.role}; {self._role} "
                "is wanted there: exchange the addresses or start another worker"
            )
        return hello

    def _refusal(self, frame: Frame) -> ProtocolError:
        text = read(frame, Failed, self.peer).message
        shown = "".join(c if c.isprintable() else " " for c in text[:500])
        return ProtocolError(f"{self.peer} refuses: {shown}")

    def _closing_on_failure(self) -> "_Closing":
        return _Closing(self)


class _Closing:
    """A connection that failed in the middle of something is not used again."""

    def __init__(self, link: WorkerLink) -> None:
        self._link = link

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._link.close()


class RemoteAccelerator:
    """An accelerator behind a link."""

    def __init__(self, link: WorkerLink) -> None:
        self.name = link.peer
        self._link = link

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Give it a layer."""
        self._link.hold(name, weight)

    def multiply(self, name: str, masked_NK: Tensor, transpose: bool) -> Tensor:
        """Products mod p, int32 [N, M], of the right shape and no more checked.

        Raises:
            TransportError: it is gone or silent.
            PeerMisbehaved: the answer has another form.
        """
        frame = Frame(
            kind=FrameKind.MULTIPLY,
            name=self._link.key(name),
            transpose=transpose,
            rows=masked_NK.shape[0],
            columns=masked_NK.shape[1],
            body=tensor_bytes(masked_NK),
        )
        answer = self._link.call(frame)
        return _product(answer, FrameKind.PRODUCT, self._link, (name, transpose), len(masked_NK))

    def close(self) -> None:
        """Close the link."""
        self._link.close()


class RemoteDealing:
    """A dealer behind a sealed link."""

    def __init__(self, link: WorkerLink) -> None:
        self.name = link.peer
        self._link = link
        self._asked: dict[int, tuple[str, bool, int]] = {}

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Give it a layer."""
        self._link.hold(name, weight)

    def ask(self, name: str, seed: bytes, num_tokens: int, transpose: bool) -> int:
        """Tell a seed; the number of the question."""
        frame = Frame(
            kind=FrameKind.DEAL,
            name=self._link.key(name),
            transpose=transpose,
            rows=num_tokens,
            body=seed,
        )
        number = self._link.send(frame)
        self._asked = {number: (name, transpose, num_tokens)}
        return number

    def answer(self, number: int) -> Tensor:
        """What takes the pad off, int32 [N, M]."""
        name, transpose, num_tokens = self._asked.pop(number)
        answer = self._link.receive(number)
        return _product(answer, FrameKind.DEALT, self._link, (name, transpose), num_tokens)

    def close(self) -> None:
        """Close the link."""
        self._link.close()


def check_apart(accelerator: Hello, dealer: Hello, may_share_machine: bool) -> None:
    """Refuse a dealer that is the accelerator: it would know every pad and what it masks.

    Two processes on one machine have one operator; only tests and demonstrations want that. What
    workers say of themselves proves nothing: their owners must really be two.

    Raises:
        ConfigError: they are one process, or one machine without leave.
    """
    if accelerator.instance == dealer.instance:
        raise ConfigError("dealer and accelerator are one process, which would know every pad")
    if accelerator.machine == dealer.machine and not may_share_machine:
        raise ConfigError(
            "dealer and accelerator run on one machine: whoever owns it knows every pad; run the "
            "dealer elsewhere (masked.allow_same_machine = true is for tests alone)"
        )


def _product(
    frame: Frame, kind: FrameKind, link: WorkerLink, what: tuple[str, bool], num_tokens: int
) -> Tensor:
    name, transpose = what
    shape = (num_tokens, link.width(name, transpose))
    if frame.kind is not kind or (frame.rows, frame.columns) != shape:
        raise PeerMisbehaved(
            f"{link.peer} answered {frame.kind.name} [{frame.rows}, {frame.columns}] for {name}, "
            f"asked was {kind.name} {list(shape)}; do not use it again"
        )
    return tensor_of(frame, link.peer)
