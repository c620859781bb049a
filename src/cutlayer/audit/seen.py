"""What the server saw of a run, call by call, and which row was behind each.

It does not run (`live`) nor attack. The two are kept apart: evidence goes to attacks, what was
hidden to the scorer alone.

Shapes: N = tokens of one call, L = tokens of one row, D = hidden size.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from cutlayer.audit.evidence import Evidence, Observation
from cutlayer.audit.truth import Hidden
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import Example
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import decode
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Backward, Forward

__all__ = ["Call", "Tap", "evidence_of", "hidden_of"]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call and its reply."""

    frame: Frame
    reply: Future[Frame]


class Tap:
    """Channels that keep calls and replies while `is_on`."""

    def __init__(self, connect: Callable[[], Channel]) -> None:
        self._connect = connect
        self.is_on = False
        self.calls: list[Call] = []

    def connect(self) -> Channel:
        """A channel that is listened to."""
        return _Tapped(self._connect(), self)


class _Tapped:
    """See `Channel`."""

    def __init__(self, inner: Channel, tap: Tap) -> None:
        self._inner, self._tap = inner, tap

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._inner.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        reply = self._inner.call(frame, deadline_s)
        if self._tap.is_on:
            self._tap.calls.append(Call(frame=frame, reply=reply))
        return reply

    def close(self) -> None:
        self._inner.close()


def evidence_of(calls: Iterable[Call]) -> Evidence:
    """One observation per row of each training call, gradients included."""
    calls = list(calls)
    backward = {
        (call.frame.header.step, call.frame.header.micro): call
        for call in calls
        if isinstance(call.frame.header, Backward)
    }
    found: list[Observation] = []
    for header, call in _forwards(calls):
        back = backward.get((header.step, header.micro))
        columns = (
            _split(call.frame, "h", header.lengths),
            _split(call.reply.result(), "y", header.lengths),
            _split(None if back is None else back.frame, "grad", header.lengths),
            _split(None if back is None else back.reply.result(), "grad", header.lengths),
        )
        for h_LD, y_LD, gradient_LD, input_gradient_LD in zip(*columns, strict=True):
            assert h_LD is not None
            seen = Observation(
                number=len(found),
                phase="training",
                step=header.step,
                start=0,
                h_LD=h_LD,
                y_LD=y_LD,
                gradient_LD=gradient_LD,
                input_gradient_LD=input_gradient_LD,
            )
            found.append(seen)
    return Evidence(observations=tuple(found))


def hidden_of(calls: Iterable[Call], plan: BatchPlan, rows: Sequence[Example]) -> dict[int, Hidden]:
    """The rows behind the same observations, by their numbers."""
    found: dict[int, Hidden] = {}
    for header, _ in _forwards(calls):
        for place in plan.micro_batches(header.step - 1)[header.micro]:
            row = rows[place]
            found[len(found)] = Hidden(
                tokens=tuple(row.tokens),
                labels=tuple(row.labels),
                private=tuple(row.is_private),
                row_id=f"row{row.row_id}",
            )
    return found


def _forwards(calls: Iterable[Call]) -> list[tuple[Forward, Call]]:
    headers = [(call.frame.header, call) for call in calls]
    return [(h, c) for h, c in headers if isinstance(h, Forward) and not h.is_evaluation]


def _split(frame: Frame | None, name: str, lengths: Sequence[int]) -> list[Tensor | None]:
    """One tensor of a frame by rows; None for each where it has none."""
    if frame is None or name not in frame.tensors:
        return [None] * len(lengths)
    x_ND = decode(frame.tensors[name]).float()
    return list(x_ND.split(list(lengths)))
