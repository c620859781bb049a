"""What an attacker has: the tensors that crossed the cut, as the server saw them.

It does not read recordings (`observations`) and holds nothing that only the owner knows.

Shapes: L = vectors of one row, D = hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Evidence", "Observation", "Update"]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One row of one release, with what followed it."""

    number: int
    """Place in the evidence; a guess names it."""
    phase: str
    """training, evaluation or generation."""
    step: int
    """Training step, from 1; 0 in generation."""
    start: int
    """Position of the first vector in its row, in tokens."""
    h_LD: Tensor = field(repr=False)
    """What was released at the lower cut, decoded, float32."""
    y_LD: Tensor | None = field(default=None, repr=False)
    """What the trunk returned; None where no reply was recorded."""
    gradient_LD: Tensor | None = field(default=None, repr=False)
    """Released gradient of the summed loss at the upper cut; None where none was sent."""
    input_gradient_LD: Tensor | None = field(default=None, repr=False)
    """Gradient at the lower cut that the server computed; None where it sent none."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """An adapter update that left in the open."""

    round: int
    """Federated round, from 1."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Change of the weights by global adapter key, float32."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything of one recording."""

    observations: tuple[Observation, ...]
    updates: tuple[Update, ...] = ()
