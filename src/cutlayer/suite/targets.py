"""What the measurements must reach, and whether they do: met, missed or not measured.

It measures and prints nothing; every verdict carries its numbers as text.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cutlayer.suite.arms import Arm, Sheet
from cutlayer.suite.compare import (
    NEAR_TIE_NATS,
    Agreement,
    Difference,
    agreement,
    common_seeds,
    difference,
    score,
)
from cutlayer.suite.spec import Method, Sizes

__all__ = [
    "ASKED_TASKS",
    "CODEC_POINTS",
    "IID_POINTS",
    "LOSS_TOLERANCE",
    "MetricOf",
    "Target",
    "Verdict",
    "agreements",
    "codecs_target",
    "equality_target",
    "federation_target",
    "gain_target",
    "recovery_target",
    "signed",
    "targets",
    "with_interval",
]

CODEC_POINTS = 1.5
"""How far bf16 and fp8 may be from centralised."""
IID_POINTS = {"small": 3.0, "medium": 3.0, "full": 1.0}
"""How far several owners with evenly shared rows may be from centralised, by profile."""
LOSS_TOLERANCE = 1e-4
"""Largest relative difference of losses, float32 without noise and codec."""
ASKED_TASKS = {"small": ("topics", "sentiment")}
"""Tasks that a profile must measure; of another profile: whatever tasks it has."""

MetricOf = Callable[[str], str]
"""Task to the metric by which its runs are compared."""


_NOTHING = Sheet(
    task="",
    source="",
    model="",
    form="",
    sizes=Sizes(train_rows=1, test_rows=1, steps=1, rows_per_step=1, micro_batch_rows=1, lr=1.0),
    arms=(),
)
"""A sheet on which every target is unmeasured: what a target is called does not need results."""


class Verdict(StrEnum):
    """On one target and one task."""

    MET = "met"
    MISSED = "missed"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One verdict."""

    what: str
    """Must be reached."""
    task: str
    verdict: Verdict
    numbers: str
    """That it rests on; empty where nothing was measured."""


def targets(all_sheets: Sequence[Sheet], metric_of: MetricOf, profile: str) -> list[Target]:
    """Every target on every task that it was measured on or is asked for, in the issue's order.

    Args:
        profile: `small`, `medium` or `full`: whose bounds and tasks count.

    Raises:
        DataError: runs that must be compared answered different questions.
    """
    judges: list[Callable[[Sheet], Target]] = [
        equality_target,
        lambda sheet: codecs_target(sheet, "bf16", metric_of),
        lambda sheet: codecs_target(sheet, "fp8", metric_of),
        lambda sheet: federation_target(sheet, metric_of, profile),
        lambda sheet: recovery_target(sheet, metric_of, profile),
    ]
    asked = ASKED_TASKS.get(profile)
    found = [one for judge in judges for one in _on_all(judge, all_sheets, asked)]
    gains = [sheet for sheet in all_sheets if _must_gain(sheet, asked)]
    return found + _on_all(lambda sheet: gain_target(sheet, metric_of), gains, asked)


def equality_target(sheet: Sheet) -> Target:
    """Split equals centralised: losses over the whole run, and answers but for near ties.

    Raises:
        DataError: a run and its counterpart cannot be compared.
    """
    what = f"split equals centralised: losses to {LOSS_TOLERANCE:g}, answers but for near ties"
    found = agreements(sheet)
    if not found:
        return _unmeasured(what, sheet)
    largest = max((one.loss_difference for one in found), key=_nan_first)
    num_changed = sum(one.num_changed for one in found)
    num_ties = sum(one.num_near_ties for one in found)
    is_met = largest <= LOSS_TOLERANCE and num_changed == num_ties
    numbers = (
        f"losses differ by {largest:.1e} at most over {sum(o.num_steps for o in found)} steps; "
        f"{num_changed} of {sum(o.num_questions for o in found)} answers differ, {num_ties} of "
        f"them near ties ({NEAR_TIE_NATS:g} nats); seeds {_join(o.seed for o in found)}"
    )
    return _judged(what, sheet, is_met, numbers)


def agreements(sheet: Sheet) -> list[Agreement]:
    """Each run of the plain split arm against the centralised run of its seed."""
    split, unsplit = sheet.plain_split(), sheet.centralised()
    if split is None or unsplit is None:
        return []
    partners = {run.spec.seed: run for run in unsplit.results}
    pairs = [(run, partners.get(run.spec.seed)) for run in split.results]
    found = [agreement(run, partner) for run, partner in pairs if partner is not None]
    return [one for one in found if one.num_steps and one.num_questions]


def codecs_target(sheet: Sheet, codec: str, metric_of: MetricOf) -> Target:
    """The interval contains 0 and the mean is close."""
    what = f"{codec}: the interval contains 0, the mean is within {CODEC_POINTS:g} points"
    arm = next((arm for arm in sheet.arms if _is_codec_alone(arm, codec)), None)
    gap = _to_centralised(sheet, arm, metric_of)
    if arm is None or gap is None:
        return _unmeasured(what, sheet)
    is_met = gap.contains_zero and abs(gap.mean_points) <= CODEC_POINTS
    return _judged(what, sheet, is_met, _numbers(gap))


def federation_target(sheet: Sheet, metric_of: MetricOf, profile: str) -> Target:
    """Owners with evenly shared rows come close to one place that has all, by every strategy."""
    bound = IID_POINTS.get(profile, IID_POINTS["small"])
    what = f"4 owners, IID: the mean is within {bound:g} points"
    measured = _against_centralised(sheet, metric_of, is_skewed=False)
    is_met = all(abs(gap.mean_points) <= bound for _, gap in measured)
    return _judged_federation(what, sheet, is_met, measured)


def recovery_target(sheet: Sheet, metric_of: MetricOf, profile: str) -> Target:
    """Some strategy loses no more to skewed labels than even owners may."""
    bound = IID_POINTS.get(profile, IID_POINTS["small"])
    what = f"4 owners, label-skewed: a strategy loses no more than {bound:g} points"
    measured = _against_centralised(sheet, metric_of, is_skewed=True)
    is_met = any(gap.mean_points >= -bound for _, gap in measured)
    return _judged_federation(what, sheet, is_met, measured)


def gain_target(sheet: Sheet, metric_of: MetricOf) -> Target:
    """The tuned model beats the untuned one outside the error bars, unsplit and split."""
    what = "fine-tuned beats untuned outside the error bars"
    tuned = [arm for arm in (sheet.centralised(), sheet.plain_split()) if arm is not None]
    untuned = sheet.untuned
    if untuned is None or not tuned:
        return _unmeasured(what, sheet)
    metric = metric_of(sheet.task)
    gaps = [(arm, difference(arm, untuned, metric)) for arm in tuned]
    ceiling = score(untuned, metric).high
    is_met = all(gap.low_points > 0.0 and score(arm, metric).low > ceiling for arm, gap in gaps)
    numbers = "; ".join(f"{arm.name}: {_numbers(gap)}" for arm, gap in gaps)
    return _judged(what, sheet, is_met, numbers)


def with_interval(gap: Difference) -> str:
    """Mean and interval, in points, with signs."""
    return f"{signed(gap.mean_points)} [{signed(gap.low_points)}, {signed(gap.high_points)}]"


def signed(points: float) -> str:
    """One decimal and a sign; a rounded zero has none."""
    text = f"{points:+.1f}"
    return "0.0" if float(text) == 0.0 else text


def _numbers(gap: Difference) -> str:
    seeds = f"{len(gap.by_seed_points)} seed{'s' if len(gap.by_seed_points) > 1 else ''}"
    return f"{with_interval(gap)}, {gap.num_questions} questions, {seeds}"


def _to_centralised(sheet: Sheet, arm: Arm | None, metric_of: MetricOf) -> Difference | None:
    reference = None if arm is None else sheet.partner(arm)
    if arm is None or reference is None or not common_seeds(arm, reference):
        return None
    return difference(arm, reference, metric_of(sheet.task))


def _is_codec_alone(arm: Arm, codec: str) -> bool:
    spec = arm.spec
    is_usual = (spec.head_blocks, spec.tail_blocks, spec.adapter) == (2, 2, "lora")
    wanted = (Method.SPLIT, codec, "none")
    return is_usual and (spec.method, spec.codec, spec.mechanism) == wanted


def _against_centralised(
    sheet: Sheet, metric_of: MetricOf, is_skewed: bool
) -> list[tuple[Arm, Difference]]:
    """Federations of four in which nothing else is varied, with their differences."""
    usual = (Method.TOGETHER, 4, "raw", "none", "lora")
    found = []
    for arm in sheet.arms:
        spec = arm.spec
        kind = (spec.method, spec.owners, spec.codec, spec.mechanism, spec.adapter)
        if kind == usual and (spec.alpha is not None) == is_skewed:
            gap = _to_centralised(sheet, arm, metric_of)
            found += [] if gap is None else [(arm, gap)]
    return found


def _judged_federation(
    what: str, sheet: Sheet, is_met: bool, measured: Sequence[tuple[Arm, Difference]]
) -> Target:
    if not measured:
        return _unmeasured(what, sheet)
    numbers = "; ".join(
        f"{arm.spec.strategy}: {_numbers(gap)}{', same rows in every step' * _has_twin(sheet, arm)}"
        for arm, gap in measured
    )
    return _judged(what, sheet, is_met, numbers)


def _has_twin(sheet: Sheet, arm: Arm) -> bool:
    partner = sheet.partner(arm)
    return partner is not None and partner.spec.owners == arm.spec.owners


def _must_gain(sheet: Sheet, asked: Sequence[str] | None) -> bool:
    return sheet.source == "packaged" if asked is None else sheet.task in asked


def _on_all(
    judge: Callable[[Sheet], Target], all_sheets: Sequence[Sheet], asked: Sequence[str] | None
) -> list[Target]:
    """Verdicts of one target; it is missing once for each task asked for, else once for all."""
    verdicts = [judge(sheet) for sheet in all_sheets]
    measured = [one for one in verdicts if one.verdict is not Verdict.NOT_MEASURED]
    done = {one.task for one in measured}
    wanted = asked if asked is not None else () if done else ("any",)
    missing = [task for task in wanted if task not in done]
    what = judge(_NOTHING).what
    unmeasured = [
        Target(what=what, task=task, verdict=Verdict.NOT_MEASURED, numbers="") for task in missing
    ]
    return measured + unmeasured


def _judged(what: str, sheet: Sheet, is_met: bool, numbers: str) -> Target:
    verdict = Verdict.MET if is_met else Verdict.MISSED
    return Target(what=what, task=sheet.task, verdict=verdict, numbers=numbers)


def _unmeasured(what: str, sheet: Sheet) -> Target:
    return Target(what=what, task=sheet.task, verdict=Verdict.NOT_MEASURED, numbers="")


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _join(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)
