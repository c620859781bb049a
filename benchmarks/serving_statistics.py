"""Sums of the serving benchmark: rates in common time, fairness, and a test of two samples.

It measures nothing and knows no process.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.report import median

__all__ = ["Rates", "common_rates", "jain_index", "same_distribution_p", "token_ms"]

_LEAST_EXPECTED = 5.0
"""Rarer outcomes are counted as one: the chi-square law is a limit of many counts."""


@dataclass(frozen=True)
class Rates:
    """What streams did in the time in which all of them decoded."""

    tokens_per_s: tuple[float, ...]
    """Of each stream."""
    begin_s: float
    """Monotonic clock."""
    end_s: float

    @property
    def total(self) -> float:
        """Tokens per second of all streams together."""
        return sum(self.tokens_per_s)


def common_rates(ends_s: Sequence[Sequence[float]]) -> Rates:
    """Tokens/s of every stream while all of them decode: after the last first token, before the
    first last one.

    Where they never decode at once, all of the time from the first token to the last counts, which
    flatters nobody. A token lies between its own time and its predecessor's, by its share of it.

    Args:
        ends_s: per stream the times of its tokens, at least two, ascending.
    """
    begin_s, end_s = max(ends[0] for ends in ends_s), min(ends[-1] for ends in ends_s)
    if end_s <= begin_s:
        begin_s, end_s = min(ends[0] for ends in ends_s), max(ends[-1] for ends in ends_s)
    counts = [float(np.diff(_done_at(ends, (begin_s, end_s)))[0]) for ends in ends_s]
    return Rates(tuple(count / (end_s - begin_s) for count in counts), begin_s, end_s)


def token_ms(ends_s: Sequence[float], skip: int = 2) -> float:
    """Median milliseconds of one token of a stream after its first ones, which warm up."""
    return 1000 * median(np.diff(ends_s).tolist(), skip=min(skip, len(ends_s) - 2))


def jain_index(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 if all n shares are equal, 1/n if one has everything.

    Source: Jain, Chiu, Hawe: A Quantitative Measure of Fairness, DEC-TR-301 (1984), equation 1.
    """
    return sum(shares) ** 2 / (len(shares) * sum(x * x for x in shares))


def same_distribution_p(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Probability of two samples that differ at least so much if they were drawn alike.

    Source: chi-square test of homogeneity; statistic sum_i (a_i sqrt(B/A) - b_i sqrt(A/B))^2 /
    (a_i + b_i) for counts a_i of A and b_i of B draws, k - 1 degrees of freedom for k outcomes.
    """
    tables = _pooled(Counter(one), Counter(other))
    if len(tables) < 2:
        return 1.0
    a, b = np.array(tables, dtype=float).T
    scale = float(np.sqrt(b.sum() / a.sum()))
    statistic = float(((a * scale - b / scale) ** 2 / (a + b)).sum())
    half = torch.tensor([(len(tables) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _done_at(
    ends_s: Sequence[float], edges_s: Sequence[float]
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    # Several tokens may come at one time: only the last of them is a point of the line.
    times = dict(zip(ends_s, range(len(ends_s)), strict=True))
    return np.interp(edges_s, list(times), list(times.values())).astype(np.float64)


def _pooled(one: "Counter[Hashable]", other: "Counter[Hashable]") -> list[tuple[int, int]]:
    """Counts of each outcome in both samples, with the rare ones as one outcome."""
    num_one, num_other = one.total(), other.total()
    least_share = min(num_one, num_other) / (num_one + num_other)
    kept, rare = [], (0, 0)
    for outcome in sorted(one.keys() | other.keys(), key=repr):
        pair = one[outcome], other[outcome]
        if sum(pair) * least_share >= _LEAST_EXPECTED:
            kept.append(pair)
        else:
            rare = rare[0] + pair[0], rare[1] + pair[1]
    return [*kept, rare] if sum(rare) else kept
