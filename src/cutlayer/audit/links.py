"""Which rows of a recording are the same text, released again.

It looks at lengths and distances alone: nothing names a row. It does not average.

Shapes: L = vectors of one row, D = hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.attack import TimeLimit
from cutlayer.audit.chains import Chain
from cutlayer.audit.known_noise import are_withheld

__all__ = ["Group", "link"]


@dataclass(kw_only=True)
class Group:
    """Releases that are taken to be of one row."""

    chains: list[Chain] = field(default_factory=list)
    """All of them, replays included."""
    distinct: list[Tensor] = field(default_factory=list, repr=False)
    """Different bytes only: a replay has the same noise and says nothing new."""

    @property
    def mean_LD(self) -> Tensor:
        """Mean of the distinct ones."""
        return torch.stack(self.distinct).mean(0)


def link(
    rows: Sequence[Chain],
    noise_variance: float,
    token_variance: float,
    is_time_up: TimeLimit = lambda: False,
) -> list[Group]:
    """Group rows of equal length whose distance is that of two noises rather than of two texts.

    Two releases of one row differ by the noise alone: their mean squared difference per value is
    s^2 (1 + 1/n), with a mean over n on the other side. Two texts add 2 v, v the variance between
    tokens. The limit is half-way, s^2 (1 + 1/n) + v, which leaves room for adapters that moved.

    Args:
        rows: in the order of the recording.
        noise_variance: s^2, per value.
        token_variance: v, per value.
        is_time_up: asked before each row; those after it are taken for texts of their own.
    """
    groups: list[Group] = []
    for chain in rows:
        h_LD = chain.h_LD
        group = None
        if not is_time_up():
            group = _nearest(groups, chain, h_LD, noise_variance, token_variance)
        if group is None:
            group = Group()
            groups.append(group)
        group.chains.append(chain)
        if not any(torch.equal(h_LD, other) for other in group.distinct):
            group.distinct.append(h_LD)
    return groups


def _nearest(
    groups: Sequence[Group], chain: Chain, h_LD: Tensor, noise: float, token: float
) -> Group | None:
    best, best_off = None, 0.0
    for group in groups:
        if group.chains[0].length != chain.length or group.chains[0].pieces[0].start:
            continue
        if any(torch.equal(h_LD, other) for other in group.distinct):
            return group
        if _step(group.chains[-1]) == _step(chain):
            # One step has a row once; and without steps (generation) nothing tells rows apart.
            continue
        off = _distance(group, h_LD) - noise * (1 + 1 / len(group.distinct)) - token
        if off < best_off:
            best, best_off = group, off
    return best


def _distance(group: Group, h_LD: Tensor) -> float:
    """Mean squared difference per value, over places where both say something."""
    mean_LD = group.mean_LD
    are_there = ~(are_withheld(h_LD) | are_withheld(mean_LD))
    # The first place is left out: models put very large values there, the same for most tokens.
    are_there[0] = False
    if not bool(are_there.any()):
        return float("inf")
    return float((h_LD - mean_LD)[are_there].square().mean())


def _step(chain: Chain) -> int:
    return chain.pieces[0].step
