"""Calls of several clients as one: what they are, and how each keeps its own failure.

It does not compute (`engine`), hold runs (`host`) nor choose who shares a call (`scheduler`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from cutlayer.errors import CutlayerError
from cutlayer.server.scheduler import WorkKind
from cutlayer.wire.messages import Backward, Decode, Forward

__all__ = [
    "FAILURES",
    "Failure",
    "Joint",
    "JointWork",
    "TrunkCall",
    "TrunkResult",
    "joined",
    "together",
    "work_kind",
]

Failure = CutlayerError | RuntimeError
"""What a call may fail with; torch reports a lack of memory as a RuntimeError."""
FAILURES = (CutlayerError, RuntimeError)
"""The same, to catch."""

B = TypeVar("B")
F = TypeVar("F")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrunkCall:
    """One client's call of the trunk."""

    owner: str
    header: Forward | Backward | Decode
    tensor: Tensor
    """[N, D]: hidden states, or the gradient at the upper cut."""
    begin: int = 0
    """DECODE: first of the N tokens that is to be computed now; those before it have been."""
    end: int | None = None
    """DECODE: token before which to stop for now; None computes the rest."""

    @property
    def piece(self) -> range:
        """The tokens to compute now."""
        num_tokens = self.tensor.shape[0]
        return range(self.begin, num_tokens if self.end is None else self.end)

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to compute after this piece."""
        return self.piece.stop == self.tensor.shape[0]


@dataclass(frozen=True, kw_only=True)
class TrunkResult:
    """What the client gets."""

    tensor: Tensor | None
    """[N, D]: hidden states, or the gradient at the lower cut where it is wanted."""
    trunk_sq_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Joint:
    """A BACKWARD's place among others; the defaults are those of a call without one."""

    graph: int | None = None
    """Name of the joint forward."""
    owners: frozenset[str] = frozenset()
    """Whose gradients have not come yet."""


def _nothing() -> None:
    return


@dataclass(frozen=True, kw_only=True)
class JointWork(Generic[T]):
    """A request that may share a call of the trunk; all of it happens on the runner's thread."""

    kind: WorkKind
    prepare: Callable[[], TrunkCall]
    """Called just before computing: what waits keeps its wire size."""
    compute: Callable[[Sequence[TrunkCall]], Sequence[TrunkResult | Failure]]
    """One result per call; the same function for all that share."""
    finish: Callable[[TrunkResult], T]
    joint: Callable[[], Joint] = Joint
    abandon: Callable[[], None] = _nothing
    """Called instead of `finish` where the request ends between two of its pieces."""


def joined(results: Sequence[TrunkResult]) -> TrunkResult:
    """The result of a call that was computed in pieces."""
    if len(results) == 1:
        return results[0]
    return TrunkResult(tensor=torch.cat([r.tensor for r in results if r.tensor is not None]))


def work_kind(header: object) -> WorkKind:
    """What a call can share the trunk with."""
    match header:
        case Forward(is_evaluation=True):
            return WorkKind.EVALUATE
        case Forward():
            return WorkKind.FORWARD
        case Backward():
            return WorkKind.BACKWARD
        case Decode():
            return WorkKind.DECODE
    return WorkKind.OTHER


def together(
    calls: Sequence[TrunkCall],
    begin: Callable[[TrunkCall], B],
    compute: Callable[[Sequence[B]], Sequence[F]],
    end: Callable[[TrunkCall, B, F], TrunkResult],
) -> list[TrunkResult | Failure]:
    """Begin and end each call by itself, compute all at once; a failure is one call's alone.

    Args:
        calls: of different clients.
        begin: checks one call; who fails here takes no part.
        compute: one finding per call that has begun.
        end: one call's finding to its result.
    """
    results: dict[int, TrunkResult | Failure] = {}
    begun: dict[int, B] = {}
    for index, call in enumerate(calls):
        try:
            begun[index] = begin(call)
        except FAILURES as error:
            results[index] = error
    found = compute(list(begun.values())) if begun else []
    for (index, one), finding in zip(begun.items(), found, strict=True):
        try:
            results[index] = end(calls[index], one, finding)
        except FAILURES as error:
            results[index] = error
    return [results[index] for index in range(len(calls))]
