"""Bytes that cross the link, frame by frame, as `wire` writes them. Nothing is sent.

TLS and HTTP/2 add about one per cent, which is not counted.

Shapes: N = tokens of a call, D = hidden size.
"""

from dataclasses import dataclass

from cutlayer.model.partition import Part
from cutlayer.planner.shapes import ModelShapes
from cutlayer.planner.workload import Workload
from cutlayer.wire.codec import get_codec
from cutlayer.wire.frame import Frame, frame_bytes
from cutlayer.wire.header import Header
from cutlayer.wire.messages import (
    Backward,
    BackwardDone,
    Decode,
    Decoded,
    Forward,
    ForwardDone,
    Kind,
    Step,
)
from cutlayer.wire.packed import Packed

__all__ = ["Traffic", "TrafficModel", "tensor_bytes"]

_RUN = "0" * 32
"""As long as the ids of runs and sessions are."""
_STEP = 100


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one call and its answer."""

    up: int
    down: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(up=self.up + other.up, down=self.down + other.down)


class TrafficModel:
    """What a client's calls weigh; the cut plays no part but for whether its head has blocks."""

    def __init__(self, shapes: ModelShapes, workload: Workload) -> None:
        """
        Args:
            shapes: of the model.
            workload: rows, formats and what is trained.
        """
        self._width, self._workload = shapes.hidden_size, workload
        self._dtype = workload.dtype if workload.codec == "raw" else "float32"
        parts = workload.adapter.parts
        self._head_trains, self._trunk_trains = Part.HEAD in parts, Part.TRUNK in parts

    def forward(self, num_rows: int, is_first: bool) -> Traffic:
        """A micro-batch up to the trunk, and its output."""
        lengths = [self._workload.mean_length] * num_rows
        commit = Step(step=_STEP, client_sq_norm=0.5, num_tokens=sum(lengths), lr=1e-4)
        header = Forward(
            run_id=_RUN, step=_STEP, micro=1, lengths=lengths, commit=commit if is_first else None
        )
        done = ForwardDone(step=_STEP, micro=1)
        tokens = sum(lengths)
        return Traffic(
            up=self._frame(Kind.FORWARD, header, "h", tokens),
            down=self._frame(Kind.FORWARD_DONE, done, "y", tokens, is_like=True),
        )

    def backward(self, num_rows: int, is_last: bool, head_blocks: int) -> Traffic:
        """A gradient up to the trunk, and the one that comes down where the head learns."""
        wants_gradient = self._head_trains and head_blocks > 0
        if not wants_gradient and not self._trunk_trains:
            return Traffic(up=0, down=0)
        tokens = num_rows * self._workload.mean_length
        header = Backward(run_id=_RUN, step=_STEP, micro=1, is_last=is_last)
        done = BackwardDone(step=_STEP, micro=1, trunk_sq_norm=0.5 if is_last else None)
        name = "grad" if wants_gradient else None
        return Traffic(
            up=self._frame(Kind.BACKWARD, header, "grad", tokens),
            down=self._frame(Kind.BACKWARD_DONE, done, name, tokens, is_like=wants_gradient),
        )

    def step(self, head_blocks: int) -> Traffic:
        """One optimizer step, all micro-batches."""
        sizes = self._workload.micro_batches
        total = Traffic(up=0, down=0)
        for number, num_rows in enumerate(sizes):
            total += self.forward(num_rows, is_first=number == 0)
            total += self.backward(num_rows, number == len(sizes) - 1, head_blocks)
        return total

    def prompt(self) -> Traffic:
        """One prompt, in the pieces in which it leaves."""
        total, left, begin = Traffic(up=0, down=0), self._workload.prompt_tokens, 0
        while left > 0:
            size = min(left, self._workload.prefill_tokens)
            total += self._decode([size], [begin], opens=begin == 0)
            left, begin = left - size, begin + size
        return total

    def token(self) -> Traffic:
        """The next token of every stream, half-way through the reply."""
        streams = self._workload.streams
        place = self._workload.prompt_tokens + self._workload.new_tokens // 2
        return self._decode([1] * streams, [place] * streams, opens=False)

    def _decode(self, lengths: list[int], positions: list[int], opens: bool) -> Traffic:
        limit = self._workload.prompt_tokens + self._workload.new_tokens
        header = Decode(
            session_id=_RUN,
            rows=list(range(len(lengths))),
            lengths=lengths,
            positions=positions,
            max_lengths=[limit] * len(lengths) if opens else [],
        )
        tokens = sum(lengths)
        return Traffic(
            up=self._frame(Kind.DECODE, header, "h", tokens),
            down=self._frame(Kind.DECODED, Decoded(), "y", tokens, is_like=True),
        )

    def _frame(
        self, kind: Kind, header: Header, name: str | None, num_tokens: int, is_like: bool = False
    ) -> int:
        packed = self._packed(num_tokens)
        tensors = {} if name is None else {name: packed}
        return frame_bytes(Frame(kind=kind, header=header, tensors=tensors, is_like_call=is_like))

    def _packed(self, num_tokens: int) -> Packed:
        shape = (num_tokens, self._width)
        sizes = get_codec(self._workload.codec).layout(shape, self._dtype)
        buffers = tuple(bytes(size) for size in sizes)
        return Packed(codec=self._workload.codec, dtype=self._dtype, shape=shape, buffers=buffers)


def tensor_bytes(shape: tuple[int, ...], codec: str, dtype: str) -> int:
    """Bytes of a tensor on the wire, without its frame."""
    return sum(get_codec(codec).layout(shape, dtype if codec == "raw" else "float32"))
