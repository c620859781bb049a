"""What an honest trunk's gradient looks like beside the one that was sent to it.

It needs no weights and raises nothing. A server that trains the head for a purpose of its own
(feature hijacking) returns the gradient of its own objective: that is not zero where nothing can
flow, has another size, and loses the likeness to the client's gradient. In a deep trunk the last
of these is too weak to be used; `spot_check` recomputes.

Shapes: N = vectors of a call, D = hidden size, B = rows.

Source: Pasquini, Ateniese, Bernaschi, Unleashing the Tiger (arXiv 2012.02670), the attack; Erdogan
et al., SplitGuard (arXiv 2108.09052), detection by what a gradient is a function of.
"""

import math

import torch
from torch import Tensor

from cutlayer.client.return_profile import Echoes, Likeness, Running
from cutlayer.model.rows import Rows

__all__ = ["GradientWatch", "reach"]

_FURTHEST = math.log(1e6)
_LEAST_SPREAD = math.log(30)
"""Log factor by which the gain of a call may always differ: rows differ by as much."""
_NEGLIGIBLE = 1e-10
"""Norm of a row's gradient below which rounding decides."""


class GradientWatch:
    """Profile of the gradients at the lower cut."""

    def __init__(self) -> None:
        self._gain, self._alignment, self._echoes = Running(), Likeness(), Echoes()

    def fault(self, sent_ND: Tensor, returned_ND: Tensor, rows: Rows) -> str | None:
        """What an honest trunk would not have returned; None where nothing is wrong.

        Args:
            sent_ND: gradient of the loss at the upper cut, as the server has it.
            returned_ND: gradient at the lower cut, finite.
            rows: their layout.
        """
        if bool(returned_ND[~reach(sent_ND, rows)].any()):
            return (
                "it is not zero for tokens that cannot have changed the loss, so it is not the "
                "gradient of that loss"
            )
        gains = _log_gains(sent_ND, returned_ND, rows)
        if not gains:
            return None
        if self._echoes.is_echo(sent_ND, returned_ND):
            return "the same gradient was returned for another one before (a replay)"
        return self._size_fault(gains) or self._direction_fault(sent_ND, returned_ND)

    def _size_fault(self, gains: list[float]) -> str | None:
        gain = sorted(gains)[len(gains) // 2]
        if abs(gain) > _FURTHEST or self._gain.strays(gain, _LEAST_SPREAD):
            usual = math.exp(self._gain.mean) if self._gain.is_known else 1.0
            return f"it is {math.exp(gain):.3g} times the one that was sent, usual is {usual:.3g}"
        self._gain.add(gain)
        return None

    def _direction_fault(self, sent_ND: Tensor, returned_ND: Tensor) -> str | None:
        is_sent_N = sent_ND.any(dim=1)
        cosines = torch.cosine_similarity(sent_ND[is_sent_N], returned_ND[is_sent_N], dim=1)
        value = float(cosines.mean())
        if self._alignment.loses(value):
            return (
                f"its likeness to the gradient that was sent fell from {self._alignment.usual:.2f} "
                f"to {value:.2f}, as where a server follows an aim of its own"
            )
        return None


def reach(sent_ND: Tensor, rows: Rows) -> Tensor:
    """Bool [N]: the places whose input can have a gradient.

    A causal trunk's output depends on this place and earlier ones of the row, so the gradient of an
    input comes from this place and later ones.
    """
    is_sent_N = sent_ND.any(dim=1)
    parts = [part.flip(0).cummax(0).values.flip(0) for part in is_sent_N.split(rows.lengths)]
    return torch.cat(parts)


def _log_gains(sent_ND: Tensor, returned_ND: Tensor, rows: Rows) -> list[float]:
    sent_B = torch.stack([part.norm() for part in sent_ND.split(rows.lengths)])
    returned_B = torch.stack([part.norm() for part in returned_ND.split(rows.lengths)])
    is_counted_B = sent_B > _NEGLIGIBLE
    ratios_B = returned_B[is_counted_B].clamp_min(1e-30) / sent_B[is_counted_B]
    return [float(gain) for gain in ratios_B.log()]
