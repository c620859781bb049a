"""Trials with made-up numbers, for whatever only shows or keeps them."""

from dataclasses import replace

from cutlayer.audit.attack import Aim
from cutlayer.audit.grid import Rule, TrialSpec
from cutlayer.audit.results import AttackResult, Trial, Utility
from cutlayer.audit.settings import Phase
from cutlayer.audit.shares import Share

__all__ = ["attack_result", "grid_of_trials", "trial_of"]


def attack_result(
    name: str, recovery: float, aim: Aim = Aim.TOKENS, **changes: object
) -> AttackResult:
    """One attack that recovered that share of 412 tokens."""
    share = Share(
        value=recovery, low=max(0.0, recovery - 0.03), high=min(1.0, recovery + 0.02), num=412
    )
    made = AttackResult(
        attack=name,
        aim=aim,
        about=f"what {name} does",
        recovery=share,
        chance=0.05,
        chance_error=0.004,
        rouge_l=recovery,
        rare=Share(value=recovery, low=0.0, high=1.0, num=57),
        seconds=12.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def trial_of(recovery: float, scale: float | None = None, cut: tuple[int, int] = (2, 27)) -> Trial:
    """One setting; without a scale it has no noise."""
    rule = Rule(mechanism="none") if scale is None else Rule(mechanism="gaussian", scale=scale)
    spec = TrialSpec(lower=cut[0], upper=cut[1], rule=rule, withhold="none", phase=Phase.BASE)
    skipped = AttackResult(
        attack="learned_inverter", aim=Aim.TOKENS, about="learns", skipped="no public text"
    )
    return Trial(
        spec=spec,
        label=spec.label,
        mechanism_label=rule.label,
        guarantee="no noise: none" if scale is None else "no guarantee (unclipped)",
        epsilon="no guarantee (unclipped)",
        threat="T1",
        verdict_key=f"{cut} {rule.label}",
        num_rows=24,
        num_tokens=412,
        passes=1,
        attacks=(
            attack_result("vocabulary_matching", recovery, num_fallbacks=3, num_unfinished=2),
            attack_result("nearest_embedding", recovery / 9),
            attack_result("label_inference", 0.9, Aim.LABELS, majority=0.5, rouge_l=None),
            attack_result("language_prior", 0.06),
            skipped,
        ),
        utility=Utility(accuracy=0.86 - 0.4 * (1 - recovery), perplexity=3.2, num_rows=200),
        seconds=230.0,
    )


def grid_of_trials() -> list[Trial]:
    """Three cuts by five rules."""
    scales = (None, 0.02, 0.05, 0.1, 0.3)
    return [
        trial_of(max(0.04, 0.99 - 2.5 * (scale or 0.0) - 0.05 * place), scale, cut)
        for place, cut in enumerate(((1, 28), (2, 27), (4, 25)))
        for scale in scales
    ]
