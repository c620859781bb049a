"""Public rows through the head as the attacker has it: vectors whose tokens are known.

It does not look at evidence. Without public rows random ones are used.

Shapes: L = tokens of one row, D = hidden size, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.attack import TimeLimit
from cutlayer.audit.knowledge import Knowledge
from cutlayer.model.rows import pack

__all__ = ["CALIBRATION_SHARE", "Calibration", "calibrate"]

CALIBRATION_SHARE = 0.25
"""Of an attack's time, before it looks at evidence."""

_MIN_ROWS = 4
"""Made whatever the time."""
_MAX_ROWS, _MAX_TOKENS = 96, 64
"""Of each public row its beginning: enough for a covariance of some hundred values."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Tokens and their states."""

    rows: tuple[tuple[int, ...], ...] = field(repr=False)
    """Token rows."""
    states_LD: tuple[Tensor, ...] = field(repr=False)
    """The head's output for each row, without noise."""


@torch.no_grad()
def calibrate(knowledge: Knowledge, seed: int, is_time_up: TimeLimit) -> Calibration:
    """Run the head over public rows.

    Args:
        knowledge: its public rows, or random ones where it has none.
        seed: of the random ones.
        is_time_up: asked after each row but the first few.
    """
    public = [tuple(row[:_MAX_TOKENS]) for row in knowledge.public_rows if len(row) > 1]
    rows = public[:_MAX_ROWS] or _random_rows(len(knowledge.embedding_VD), seed)
    head = knowledge.parts[0]
    states_LD: list[Tensor] = []
    for row in rows:
        if len(states_LD) >= _MIN_ROWS and is_time_up():
            break
        states_LD.append(head(pack([row])))
    return Calibration(rows=tuple(rows[: len(states_LD)]), states_LD=tuple(states_LD))


def _random_rows(vocabulary: int, seed: int) -> Sequence[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (48, 48), generator=generator)
    return [tuple(row) for row in tokens.tolist()]
