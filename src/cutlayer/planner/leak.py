"""What an attacker recovers at a cut, as audits measured it.

It measures nothing and fits no curve: where no cut nearby was audited under the same rule, it says
nothing, and what was measured at another cut says at which.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cutlayer.model.partition import Cut
from cutlayer.planner.leak_files import LeakRule, Measured, read_measured
from cutlayer.privacy.mechanism import NoiseSettings

__all__ = ["Leak", "LeakTable", "read_leaks", "rule_of"]

_NEIGHBOUR = 2
"""Blocks by which both ends of a neighbouring cut may differ."""
_ROUNDING = 1e-5
"""Numbers in a setting's name have six digits."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What the strongest attack recovered, and at which cut that was."""

    asked: Cut
    """The cut that was asked about."""
    measured: Measured
    """Where it was measured."""

    @property
    def recovery(self) -> float:
        """Share of private tokens, 0 to 1."""
        return self.measured.recovery

    @property
    def attack(self) -> str:
        """The attack that recovered them."""
        return self.measured.attack

    @property
    def is_exact(self) -> bool:
        """Whether exactly this cut was audited."""
        return self.measured.cut == self.asked

    @property
    def note(self) -> str:
        """Where it was measured, if elsewhere; empty where it was here."""
        if self.is_exact:
            return ""
        there = self.measured.cut
        text = f"measured at {there.lower}:{there.upper}"
        if there.lower > self.asked.lower:
            # Attacks get easier towards the embedding.
            text += ", with more blocks before the cut: this one may leak more"
        return text

    @property
    def text(self) -> str:
        """For a table's cell."""
        mark = "" if self.is_exact else "~"
        return f"{mark}{100 * self.recovery:.0f} %"


class LeakTable:
    """All that was audited."""

    def __init__(self, measured: Sequence[Measured] = ()) -> None:
        """
        Args:
            measured: audited settings; several of one cut and rule are all kept.
        """
        self.measured = tuple(measured)

    def leak_at(self, cut: Cut, rule: LeakRule) -> Leak | None:
        """The worst that was measured at this cut, else at the nearest one, under the same rule.

        Args:
            cut: where.
            rule: what protects what leaves there (`rule_of`).
        """
        like = [one for one in self.measured if _is_same(one.rule, rule)]
        near = [one for one in like if _distance(one.cut, cut) <= _NEIGHBOUR]
        if not near:
            return None
        nearest = min((one.cut for one in near), key=lambda other: _nearness(other, cut))
        here = [one for one in near if one.cut == nearest]
        return Leak(asked=cut, measured=max(here, key=lambda one: one.recovery))


def read_leaks(paths: Sequence[Path]) -> LeakTable:
    """Results of audits; no paths give an empty table.

    Raises:
        StorageError: a file is missing, damaged, or holds no audited setting.
    """
    return LeakTable(read_measured(paths))


def rule_of(noise: NoiseSettings) -> LeakRule:
    """What the settings' [privacy] does at the lower cut."""
    return LeakRule(
        mechanism=noise.mechanism,
        scale=noise.scale,
        clip=noise.clip,
        withhold=str(noise.withhold),
        keep_share=noise.keep_share,
    )


def _is_same(one: LeakRule, other: LeakRule) -> bool:
    names = (one.mechanism, one.withhold) == (other.mechanism, other.withhold)
    pairs = (
        (one.scale, other.scale),
        (one.clip, other.clip),
        (one.keep_share, other.keep_share),
    )
    return names and all(_is_close(*pair) for pair in pairs)


def _is_close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=_ROUNDING)


def _distance(one: Cut, other: Cut) -> int:
    return max(abs(one.lower - other.lower), abs(one.upper - other.upper))


def _nearness(one: Cut, asked: Cut) -> tuple[int, int, int]:
    """Smaller is nearer; of two the one with fewer blocks before the cut, which leaks more."""
    lower, upper = abs(one.lower - asked.lower), abs(one.upper - asked.upper)
    return lower + upper, lower, one.lower
