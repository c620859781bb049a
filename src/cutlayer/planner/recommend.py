"""Which cuts no other beats, and one cut per goal with its reason.

It predicts nothing. Where no audit says how much a cut leaks, the blocks of the client's thinner
end stand for privacy: an assumption, and whoever reads a reason is told so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cutlayer.planner.plan import CutPlan

__all__ = ["Choice", "Goal", "pareto_front", "recommend"]

ASSUMED = "no audit: that more blocks leak less, though never nothing, is an assumption"


class Goal(StrEnum):
    """What a cut is chosen for."""

    FASTEST = "fastest"
    MOST_PRIVATE = "most private"
    LEAST_MEMORY = "least memory"
    BALANCED = "balanced"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One cut for one goal."""

    goal: Goal
    plan: CutPlan
    reason: str
    """One sentence."""


def pareto_front(plans: Sequence[CutPlan]) -> list[CutPlan]:
    """Those that no other beats in client memory, seconds and privacy.

    Privacy is what audits recovered where both cuts have one, else the blocks of the thinner end.
    """
    return [plan for plan in plans if not any(_beats(other, plan) for other in plans)]


def recommend(plans: Sequence[CutPlan]) -> list[Choice]:
    """One choice per goal; the fastest is left out where no time is known.

    Args:
        plans: feasible ones, at least one.
    """
    found = []
    if any(_seconds(plan) for plan in plans):
        found.append(_fastest(plans))
    found += [_most_private(plans), _least_memory(plans), _balanced(plans)]
    return found


def _seconds(plan: CutPlan) -> list[float]:
    times = (plan.seconds.training, plan.seconds.decode)
    return [seconds for seconds in times if seconds is not None]


def _beats(one: CutPlan, other: CutPlan) -> bool:
    """Nowhere worse and somewhere better."""
    pairs: list[tuple[float, float]] = [(one.client.total, other.client.total)]
    pairs += zip(_seconds(one), _seconds(other), strict=True)
    if one.leak is not None and other.leak is not None:
        pairs.append((one.leak.recovery, other.leak.recovery))
    else:
        pairs.append((-one.depth, -other.depth))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _fastest(plans: Sequence[CutPlan]) -> Choice:
    has_training = any(plan.seconds.training is not None for plan in plans)

    def time_of(plan: CutPlan) -> float:
        seconds = plan.seconds.training if has_training else plan.seconds.decode
        return math.inf if seconds is None else seconds

    best = min(plans, key=lambda plan: (time_of(plan), plan.client.total, -plan.depth))
    slowest = max(plans, key=time_of)
    what = "training" if has_training else "decoding"
    reason = (
        f"{time_of(best):.3g} s per 1,000 tokens of {what}, against {time_of(slowest):.3g} s at "
        f"{_name(slowest)}"
    )
    if best.seconds.client_share is not None:
        reason += f"; the client computes for {best.seconds.client_share:.0%} of a step"
    reason += _embedding_warning(best)
    return Choice(goal=Goal.FASTEST, plan=best, reason=f"{reason}.")


def _most_private(plans: Sequence[CutPlan]) -> Choice:
    audited = [plan for plan in plans if plan.leak is not None]
    if not audited:
        best = min(plans, key=lambda plan: (-plan.depth, plan.client.total))
        reason = (
            f"{_blocks(best.head_blocks)} before and {best.tail_blocks} after the trunk, the most "
            f"that is feasible at both ends ({ASSUMED})."
        )
        return Choice(goal=Goal.MOST_PRIVATE, plan=best, reason=reason)
    # What was measured elsewhere stands in only where nothing was measured at the cut itself.
    exact = [plan for plan in audited if plan.leak is not None and not plan.leak.note]
    audited = exact or audited
    best = min(audited, key=lambda plan: (_recovery(plan), plan.client.total))
    assert best.leak is not None
    where = f" ({best.leak.note})" if best.leak.note else ""
    reason = (
        f"{best.leak.attack} recovered {best.leak.recovery:.0%} of the tokens here{where}, the "
        f"least of {len(audited)} cuts that audits speak of."
    )
    return Choice(goal=Goal.MOST_PRIVATE, plan=best, reason=reason)


def _recovery(plan: CutPlan) -> float:
    return 1.0 if plan.leak is None else plan.leak.recovery


def _least_memory(plans: Sequence[CutPlan]) -> Choice:
    best = min(plans, key=lambda plan: (plan.client.total, -plan.depth))
    most = max(plans, key=lambda plan: plan.client.total)
    reason = (
        f"{best.client.total / 1e9:.2f} GB at the client, against {most.client.total / 1e9:.2f} GB "
        f"at {_name(most)}"
    )
    reason += _embedding_warning(best)
    return Choice(goal=Goal.LEAST_MEMORY, plan=best, reason=f"{reason}.")


def _balanced(plans: Sequence[CutPlan]) -> Choice:
    scales = [_scale(plans, measure) for measure in _measures(plans)]
    # Embedding rows are no secret to whoever has the model: the last thing to recommend.
    hiding = [plan for plan in plans if plan.head_blocks > 0] or plans
    best = min(hiding, key=lambda plan: (sum(scale(plan) ** 2 for scale in scales), plan.cut.lower))
    pieces = [f"{best.client.total / 1e9:.2f} GB at the client"]
    if best.seconds.training is not None:
        pieces.append(f"{best.seconds.training:.3g} s per 1,000 tokens of training")
    pieces.append(
        f"{_blocks(best.depth)} at the thinner end ({ASSUMED})"
        if best.leak is None
        else f"{best.leak.recovery:.0%} of the tokens recovered"
    )
    reason = f"Nearest to the best of each at once: {', '.join(pieces)}."
    return Choice(goal=Goal.BALANCED, plan=best, reason=reason)


def _measures(plans: Sequence[CutPlan]) -> list[Callable[[CutPlan], float]]:
    """What is balanced, smaller is better, on scales where equal distances mean about the same."""
    found: list[Callable[[CutPlan], float]] = [lambda plan: math.log(plan.client.total)]
    if all(_seconds(plan) for plan in plans):
        found.append(lambda plan: math.log(max(1e-9, math.prod(_seconds(plan)))))
    if all(plan.leak is not None for plan in plans):
        found.append(_recovery)
    else:
        # Each further block is assumed to add less.
        found.append(lambda plan: 1 / (1 + plan.depth))
    return found


def _scale(
    plans: Sequence[CutPlan], measure: Callable[[CutPlan], float]
) -> Callable[[CutPlan], float]:
    """The same from 0 (best of all) to 1 (worst of all)."""
    values = [measure(plan) for plan in plans]
    low, width = min(values), max(values) - min(values)
    return lambda plan: (measure(plan) - low) / width if width else 0.0


def _embedding_warning(plan: CutPlan) -> str:
    if plan.head_blocks:
        return ""
    return "; embedding rows leave, which anybody who has the model reads off"


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def _name(plan: CutPlan) -> str:
    return f"{plan.cut.lower}:{plan.cut.upper}"
