"""Two settings on the same questions: how far apart their scores, losses and answers are.

It judges nothing (`targets`) and prints nothing (`tables`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cutlayer.errors import DataError
from cutlayer.evaluation.statistics import Summary, summarise
from cutlayer.suite.arms import Arm
from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import Method

__all__ = [
    "NEAR_TIE_NATS",
    "Agreement",
    "Difference",
    "agreement",
    "common_seeds",
    "difference",
    "score",
]

NEAR_TIE_NATS = 1e-4
"""Two choices whose log-likelihoods are closer may change places by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Score of one setting minus that of another, in points of 100."""

    mean_points: float
    low_points: float
    """2.5 % quantile of resampled means."""
    high_points: float
    """97.5 % quantile of resampled means."""
    by_seed_points: tuple[float, ...]
    """Mean over the questions of each common seed, by seed."""
    num_questions: int
    """That were resampled; of all seeds together where each has its own."""

    @property
    def contains_zero(self) -> bool:
        """Whether the interval leaves open which of the two is better."""
        return self.low_points <= 0.0 <= self.high_points


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far one run of split training is from the unsplit run of the same seed."""

    seed: int
    num_steps: int
    loss_difference: float
    """Largest |split - unsplit| / |unsplit| over all steps."""
    num_questions: int
    num_changed: int
    """Questions with another answer: another choice, or a reply that is not the same text."""
    num_near_ties: int
    """Of those, choices that the unsplit run has within `NEAR_TIE_NATS` of its best."""
    log_likelihood_difference: float | None
    """Largest over all choices, in nats; None for replies."""


def score(arm: Arm, metric: str) -> Summary:
    """Mean over questions (of each the mean over seeds) and its interval; 0 to 1.

    Args:
        metric: key of `RunResult.items`.

    Raises:
        DataError: a run lacks the metric.
    """
    return _summary(*_per_question([(run, _items(run, metric)) for run in arm.results]))


def difference(arm: Arm, reference: Arm, metric: str) -> Difference:
    """Paired difference over the seeds that both have; same input, same numbers.

    Questions are resampled (whole groups of them where a result has groups), not seeds: of each
    question first the mean over the common seeds of (arm - reference) is taken. Where every seed
    has its own questions, those of all are pooled. The untuned model has no seed: it is the partner
    of every run on the same questions.

    Args:
        metric: key of `RunResult.items`.

    Raises:
        DataError: other questions, no common seed, or a run lacks the metric.

    Source: Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004), paired
        resampling; the interval is Efron's percentile interval (1979), 1,000 resamples, seed 0.
    """
    gaps = []
    for run, partner in _pairs(arm, reference):
        _require_same_questions(run, partner)
        ours, theirs = _items(run, metric), _items(partner, metric)
        _require(len(ours) == len(theirs), run, partner, "differ in the number of scores")
        gaps.append((run, [a - b for a, b in zip(ours, theirs, strict=True)]))
    summary = _summary(*_per_question(gaps))
    return Difference(
        mean_points=_points(summary.mean),
        low_points=_points(summary.low),
        high_points=_points(summary.high),
        by_seed_points=tuple(_points(float(np.mean(gap))) for _, gap in gaps),
        num_questions=summary.num_items,
    )


def common_seeds(arm: Arm, reference: Arm) -> tuple[int, ...]:
    """Seeds that both have; those of the other where one is untuned and has none."""
    if reference.spec.method is Method.UNTUNED:
        return arm.seeds
    if arm.spec.method is Method.UNTUNED:
        return reference.seeds
    return tuple(seed for seed in arm.seeds if seed in reference.seeds)


def agreement(split: RunResult, unsplit: RunResult) -> Agreement:
    """Losses step by step and answers question by question, of runs of one seed.

    Raises:
        DataError: other questions, another number of steps or answers, or another seed.
    """
    _require_same_questions(split, unsplit)
    _require(split.spec.seed == unsplit.spec.seed, split, unsplit, "have different seeds")
    _require(len(split.losses) == len(unsplit.losses), split, unsplit, "differ in their steps")
    changed = _changed(split, unsplit)
    return Agreement(
        seed=split.spec.seed,
        num_steps=len(split.losses),
        loss_difference=_largest_relative(split.losses, unsplit.losses),
        num_questions=len(split.chosen or split.reply_digests),
        num_changed=len(changed),
        num_near_ties=sum(_is_near_tie(split, unsplit, place) for place in changed),
        log_likelihood_difference=_likelihood_difference(split, unsplit),
    )


def _pairs(arm: Arm, reference: Arm) -> list[tuple[RunResult, RunResult]]:
    """Each run with its partner: of the same seed, or any where the partner has none."""
    if reference.spec.method is Method.UNTUNED:
        return [(run, _untuned_for(run, reference)) for run in arm.results]
    if arm.spec.method is Method.UNTUNED:
        return [(_untuned_for(run, arm), run) for run in reference.results]
    partners = {run.spec.seed: run for run in reference.results}
    pairs = [(run, partners[run.spec.seed]) for run in arm.results if run.spec.seed in partners]
    if not pairs:
        raise DataError(
            f"{arm.name} (seeds {list(arm.seeds)}) and {reference.name} (seeds "
            f"{list(reference.seeds)}) of {arm.spec.task} have no seed in common; run the missing"
        )
    return pairs


def _untuned_for(run: RunResult, untuned: Arm) -> RunResult:
    """The untuned run on the same questions; else any, which is refused with both names."""
    by_questions = {other.questions_digest: other for other in untuned.results}
    return by_questions.get(run.questions_digest, untuned.results[0])


def _items(run: RunResult, metric: str) -> tuple[float, ...]:
    if metric not in run.items:
        known = ", ".join(sorted(run.items)) or "none"
        raise DataError(f"{run.spec.run_id} has no scores by question of {metric!r}; has: {known}")
    return run.items[metric]


def _per_question(
    runs: Sequence[tuple[RunResult, Sequence[float]]],
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Mean over seeds of each question, and groups; of seeds with their own questions all."""
    if len({run.questions_digest for run, _ in runs}) > 1:
        return _pooled(runs)
    lengths = {len(values) for _, values in runs}
    if len(lengths) > 1:
        names = ", ".join(run.spec.run_id for run, _ in runs)
        raise DataError(f"{names}: {sorted(lengths)} scores for the same questions; run them again")
    means = tuple(float(value) for value in np.mean([values for _, values in runs], axis=0))
    # The same questions have the same groups; results older than that field have none.
    return means, next((run.groups for run, _ in runs if run.groups), ())


def _pooled(
    runs: Sequence[tuple[RunResult, Sequence[float]]],
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """All values; those of one question, by seeds that share it, are a group as those of a story.

    A story that is in two sets of questions counts as two: numbers hold within one set.
    """
    numbers: dict[tuple[str, int], int] = {}
    groups = []
    for run, values in runs:
        own = run.groups or range(len(values))
        groups += [numbers.setdefault((run.questions_digest, n), len(numbers)) for n in own]
    return tuple(value for _, values in runs for value in values), tuple(groups)


@lru_cache(maxsize=1024)
def _summary(values: tuple[float, ...], groups: tuple[int, ...]) -> Summary:
    """A page shows the same number in tables, verdicts and pictures: it is resampled once."""
    return summarise(values, groups)


def _points(share: float) -> float:
    """Of 100, without the last digits: sums of thirds, as three seeds have, miss 0 by 1e-16."""
    return round(100.0 * share, 9)


def _require_same_questions(run: RunResult, partner: RunResult) -> None:
    is_same = run.questions_digest == partner.questions_digest
    _require(is_same, run, partner, "answered different questions")


def _require(is_so: bool, run: RunResult, partner: RunResult, problem: str) -> None:
    if not is_so:
        names = f"{run.spec.run_id} and {partner.spec.run_id}"
        raise DataError(f"{names} {problem} and cannot be compared; run them again alike")


def _largest_relative(ours: Sequence[float], theirs: Sequence[float]) -> float:
    tiny = np.finfo(np.float64).tiny
    gaps = [abs(a - b) / max(abs(b), tiny) for a, b in zip(ours, theirs, strict=True)]
    return float(np.max(gaps)) if gaps else 0.0  # np.max keeps a nan, max may lose it


def _changed(split: RunResult, unsplit: RunResult) -> list[int]:
    """Places of questions with another answer."""
    is_alike = (len(split.chosen), len(split.reply_digests)) == (
        len(unsplit.chosen),
        len(unsplit.reply_digests),
    )
    _require(is_alike, split, unsplit, "differ in the number of answers")
    ours = split.chosen or split.reply_digests
    theirs = unsplit.chosen or unsplit.reply_digests
    return [place for place, answer in enumerate(ours) if answer != theirs[place]]


def _is_near_tie(split: RunResult, unsplit: RunResult, place: int) -> bool:
    """Whether the unsplit run held both answers for all but equal: a third one is no tie."""
    if not unsplit.chosen or place >= len(unsplit.log_likelihoods):
        return False
    likelihoods = unsplit.log_likelihoods[place]
    ours, theirs = likelihoods[split.chosen[place]], likelihoods[unsplit.chosen[place]]
    return theirs - ours < NEAR_TIE_NATS


def _likelihood_difference(split: RunResult, unsplit: RunResult) -> float | None:
    pairs = zip(split.log_likelihoods, unsplit.log_likelihoods, strict=False)
    gaps = [abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False)]
    return float(np.max(gaps)) if gaps else None
