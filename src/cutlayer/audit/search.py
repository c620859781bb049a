"""Looks for the setting with the best utility at which attacks recover no more than wanted.

A coarse grid first, then bisection of the scale for each cut, mechanism, clip, withholding and
phase. It assumes that more noise never helps an attacker, and says where that was not so. It runs
no trial itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from cutlayer.audit.grid import TrialSpec, with_scale
from cutlayer.audit.settings import SearchPlan

__all__ = ["Answer", "Family", "Tried", "families", "search"]

_GROWTH = 2.0
_FALLING = frozenset({"metric_dp"})
"""Mechanisms whose noise falls with the scale."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting that was tried."""

    spec: TrialSpec
    recovery: float | None
    """Of the strongest attack; None where none ran."""
    utility: float | None
    """More is better; None where it was not measured."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search found."""

    target: float
    best: Tried | None
    """The best utility of those at or below the target; None where none is."""
    nearest: Tried | None
    """Without a best: the least recovery found."""
    tried: tuple[Tried, ...]
    is_exhausted: bool
    """The limit of trials ended it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Settings that differ in the scale alone, least noise first."""

    specs: tuple[TrialSpec, ...]


class _NoMore(Exception):
    """The limit of trials is reached."""


def families(specs: Sequence[TrialSpec]) -> list[Family]:
    """Specs grouped by everything but the scale."""

    def key(spec: TrialSpec) -> str:
        return repr(replace(spec, rule=replace(spec.rule, scale=None)))

    ordered = sorted(specs, key=lambda spec: (key(spec), _noise(spec)))
    return [Family(specs=tuple(group)) for _, group in groupby(ordered, key)]


def search(
    specs: Sequence[TrialSpec],
    target: float,
    plan: SearchPlan,
    run: Callable[[TrialSpec], Tried],
) -> Answer:
    """Try settings until the best at the target is bracketed, or the limit is reached.

    Args:
        specs: the coarse grid.
        target: recovery that is still accepted.
        plan: limits.
        run: tries one setting, and keeps the record of it.
    """
    tried: dict[TrialSpec, Tried] = {}

    def once(spec: TrialSpec) -> Tried:
        if spec not in tried:
            if len(tried) >= plan.max_trials:
                raise _NoMore
            tried[spec] = run(spec)
        return tried[spec]

    is_exhausted = False
    try:
        # The whole coarse grid before any refinement: a short budget still sees every family.
        for spec in specs:
            once(spec)
        for family in families(specs):
            _refine(family, target, plan, once)
    except _NoMore:
        is_exhausted = True
    return _answer(target, list(tried.values()), is_exhausted)


def _refine(
    family: Family, target: float, plan: SearchPlan, once: Callable[[TrialSpec], Tried]
) -> None:
    """Find the least noise of a family that keeps to the target."""
    if any(spec.rule.scale is None for spec in family.specs):
        return
    below, above = _bracket(family, target, plan, once)
    if below is None or above is None:
        return
    for _ in range(plan.halvings):
        middle = _with_noise(above, math.sqrt(_noise(below) * _noise(above)))
        if _keeps(once(middle), target):
            above = middle
        else:
            below = middle


def _bracket(
    family: Family, target: float, plan: SearchPlan, once: Callable[[TrialSpec], Tried]
) -> tuple[TrialSpec | None, TrialSpec | None]:
    """The most noise that leaks below the least that does not; None where there is none."""
    below: TrialSpec | None = None
    for spec in family.specs:
        if _keeps(once(spec), target):
            return below, spec
        below = spec
    assert below is not None
    limit = _noise(below) * plan.max_scale_factor
    while _noise(below) * _GROWTH <= limit:
        spec = _with_noise(below, _noise(below) * _GROWTH)
        if _keeps(once(spec), target):
            return below, spec
        below = spec
    return below, None


def _keeps(tried: Tried, target: float) -> bool:
    return tried.recovery is not None and tried.recovery <= target


def _noise(spec: TrialSpec) -> float:
    """Something that grows with the noise; 0 without a scale."""
    scale = spec.rule.scale or 0.0
    return 1.0 / scale if scale and spec.rule.mechanism in _FALLING else scale


def _with_noise(spec: TrialSpec, noise: float) -> TrialSpec:
    return with_scale(spec, 1.0 / noise if spec.rule.mechanism in _FALLING else noise)


def _answer(target: float, tried: list[Tried], is_exhausted: bool) -> Answer:
    kept = [one for one in tried if _keeps(one, target)]
    best = max(
        kept, key=lambda one: -math.inf if one.utility is None else one.utility, default=None
    )
    known = [one for one in tried if one.recovery is not None]
    nearest = min(known, key=lambda one: one.recovery or 0.0, default=None)
    return Answer(
        target=target,
        best=best,
        nearest=None if best is not None else nearest,
        tried=tuple(tried),
        is_exhausted=is_exhausted,
    )
