"""A trunk that returns what it is given: rehearsals and benchmarks time the client alone with it.

It holds no weights, checks nobody and must never serve real rows.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from cutlayer.errors import ProtocolError
from cutlayer.wire.channel import Connection, Peer
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import (
    Backward,
    BackwardDone,
    Commit,
    Committed,
    Decoded,
    Forward,
    ForwardDone,
    Hello,
    Kind,
    RunOpened,
    SessionClosed,
    SessionOpened,
    Welcome,
)

__all__ = ["EchoService"]


class EchoService:
    """Accepts everybody; every call is answered at once."""

    def __init__(self, leaves: Mapping[str, str]) -> None:
        """
        Args:
            leaves: of the model's manifest, as its clients know them.
        """
        self._leaves = dict(leaves)

    def connect(self, peer: Peer) -> Connection:
        """Any peer."""
        return _Echo(self._leaves)


class _Echo:
    def __init__(self, leaves: dict[str, str]) -> None:
        self._leaves = leaves
        self._answers: dict[type[Header], Callable[[Frame], Frame]] = {
            Hello: self._welcome,
            Forward: _forward,
            Backward: _backward,
            Commit: _commit,
        }

    def submit(self, frame: Frame) -> "Future[Frame]":
        """The answer, at once."""
        future: Future[Frame] = Future()
        make = self._answers.get(type(frame.header))
        future.set_result(_plain(frame) if make is None else make(frame))
        return future

    def close(self) -> None:
        """Nothing is held."""

    def _welcome(self, frame: Frame) -> Frame:
        assert isinstance(frame.header, Hello)
        spec, leaves = frame.header.spec, self._leaves
        header = Welcome(boot_id="echo", spec=spec, leaves=leaves, software="echo")
        return Frame(kind=Kind.WELCOME, header=header)


def _forward(frame: Frame) -> Frame:
    assert isinstance(frame.header, Forward)
    header = ForwardDone(step=frame.header.step, micro=frame.header.micro)
    return Frame(kind=Kind.FORWARD_DONE, header=header, tensors={"y": frame.tensors["h"]})


def _backward(frame: Frame) -> Frame:
    call = frame.header
    assert isinstance(call, Backward)
    sq_norm = 0.0 if call.is_last else None
    header = BackwardDone(step=call.step, micro=call.micro, trunk_sq_norm=sq_norm)
    return Frame(kind=Kind.BACKWARD_DONE, header=header, tensors=dict(frame.tensors))


def _commit(frame: Frame) -> Frame:
    assert isinstance(frame.header, Commit)
    return Frame(kind=Kind.COMMITTED, header=Committed(step=frame.header.step))


def _plain(frame: Frame) -> Frame:
    """Answers that depend on the kind alone."""
    if frame.kind is Kind.DECODE:
        return Frame(kind=Kind.DECODED, header=Decoded(), tensors={"y": frame.tensors["h"]})
    if frame.kind is Kind.OPEN_RUN:
        return Frame(kind=Kind.RUN_OPENED, header=RunOpened(step=0))
    if frame.kind is Kind.OPEN_SESSION:
        opened = SessionOpened(session_id="echo", ttl_s=600.0)
        return Frame(kind=Kind.SESSION_OPENED, header=opened)
    if frame.kind is Kind.CLOSE_SESSION:
        return Frame(kind=Kind.CLOSED, header=SessionClosed(bytes_freed=0))
    raise ProtocolError(f"an echo does not answer {frame.kind.name}")
