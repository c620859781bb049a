"""Servers that lie: a channel to an honest server, whose answers are replaced on the way back.

Shapes: N = vectors of a call, D = hidden size.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutlayer.client.gradient_watch import reach
from cutlayer.model.rows import Rows
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import decode, get_codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Backward, Decode, Forward, Kind

__all__ = ["LIES", "Answer", "Lie", "LyingChannel", "features", "quiet_features"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An honest answer, about to be replaced."""

    kind: Kind
    number: int
    """How many answers of this kind were given before."""
    rows: Rows
    sent_ND: Tensor
    honest_ND: Tensor


Lie = Callable[[Answer], Tensor]


class LyingChannel:
    """Replaces answers; remembers how many tensors it was sent."""

    def __init__(self, inner: Channel, lie: Lie, kinds: frozenset[Kind], begin: int = 0) -> None:
        """Args:
        inner: to an honest server.
        lie: what is returned instead.
        kinds: of the calls whose answers are replaced.
        begin: honest answers of each kind before.
        """
        self._inner, self._lie, self._kinds, self._begin = inner, lie, kinds, begin
        self._counts: dict[Kind, int] = {}
        self._rows: dict[int, Rows] = {}
        self.num_tensors = 0
        self.is_closed = False

    @property
    def bytes_sent(self) -> int:
        """As the inner one."""
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """As the inner one."""
        return self._inner.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """Send on, and replace the answer."""
        self.num_tensors += len(frame.tensors)
        future = self._inner.call(frame, deadline_s)
        if isinstance(frame.header, Forward):
            self._rows[frame.header.micro] = Rows(lengths=tuple(frame.header.lengths))
        if frame.kind not in self._kinds:
            return future
        replaced: Future[Frame] = Future()
        try:
            replaced.set_result(self._replaced(frame, future.result()))
        except Exception as error:  # an error of the server is passed on
            replaced.set_exception(error)
        return replaced

    def close(self) -> None:
        """End."""
        self.is_closed = True
        self._inner.close()

    def _replaced(self, call: Frame, reply: Frame) -> Frame:
        number = self._counts[call.kind] = self._counts.get(call.kind, -1) + 1
        rows = self._layout(call)
        if number < self._begin or not reply.tensors:
            return reply
        ((name, packed),) = reply.tensors.items()
        (sent,) = call.tensors.values()
        answer = Answer(
            kind=call.kind,
            number=number,
            rows=rows,
            sent_ND=decode(sent).clone(),
            honest_ND=decode(packed).clone(),
        )
        lie_ND = self._lie(answer)
        return replace(reply, tensors={name: get_codec(packed.codec).encode(lie_ND)})

    def _layout(self, call: Frame) -> Rows:
        header = call.header
        if isinstance(header, Backward):
            return self._rows[header.micro]
        assert isinstance(header, Forward | Decode)
        return Rows(lengths=tuple(header.lengths))


def features(answer: Answer) -> Tensor:
    """FSHA's gradient: what moves features towards those of the server's own encoder.

    Source: Pasquini et al. (arXiv 2012.02670); the discriminator is a squared distance here.
    """
    generator = torch.Generator().manual_seed(0)
    target_D = torch.randn(answer.honest_ND.shape[1], generator=generator)
    return answer.honest_ND.norm() * torch.nn.functional.normalize(
        answer.sent_ND + target_D, dim=None
    )


def quiet_features(answer: Answer) -> Tensor:
    """The same, zero where the honest one is and as large in every row."""
    generator = torch.Generator().manual_seed(answer.number)
    wanted_ND = torch.randn(answer.honest_ND.shape, generator=generator)
    wanted_ND[~reach(answer.sent_ND, answer.rows)] = 0
    parts = zip(
        wanted_ND.split(answer.rows.lengths),
        answer.honest_ND.split(answer.rows.lengths),
        strict=True,
    )
    return torch.cat([x / x.norm().clamp_min(1e-12) * honest.norm() for x, honest in parts])


def _stale(answer: Answer) -> Tensor:
    return answer.honest_ND.roll(1, dims=0)


LIES: dict[str, Callable[[], Lie]] = {
    "zeros": lambda: lambda answer: torch.zeros_like(answer.honest_ND),
    "constant": lambda: lambda answer: answer.honest_ND[:1].expand_as(answer.honest_ND),
    "huge": lambda: lambda answer: answer.honest_ND * 100,
    "noise": lambda: (
        lambda answer: torch.randn_like(answer.honest_ND) * answer.honest_ND.norm(dim=1).mean()
    ),
    "other places": lambda: _stale,
}
"""Crafted outputs by name, each to be made anew."""
