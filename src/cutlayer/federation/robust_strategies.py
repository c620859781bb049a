"""Strategies that need to see every member's update by itself.

With them secure aggregation has to be off, so the server sees adapter updates, from which text can
be reconstructed: a choice between a curious server and a lying member.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.federation.aggregation import (
    Update,
    by_key,
    median,
    total_weight,
    trimmed_mean,
    weighted_mean,
)
from cutlayer.federation.mean_strategies import FedAvg
from cutlayer.federation.refactor import refactored
from cutlayer.federation.strategy_registry import STRATEGIES
from cutlayer.model.adapters import AdapterState

__all__ = ["Median", "Svd", "TrimmedMean"]


class _OfSingles(FedAvg):
    """Rules for which a mean is too late."""

    needs_single_updates: ClassVar[bool] = True

    def apply(self, current: AdapterState, mean: AdapterState) -> AdapterState:
        """Always refused."""
        raise ConfigError(f"strategy {self.settings.kind} needs single updates, not their mean")


@STRATEGIES.register("trimmed_mean")
class TrimmedMean(_OfSingles):
    """Adds, value by value, the mean change without the largest and smallest share `trim`.

    Equals: the plain (unweighted) mean where `trim` is 0. As long as no more members lie than are
    cut at one end, ceil(trim M) of M, every value lies between the smallest and the largest
    honest one.
    Does not equal: fedavg, whose weights count tokens; here a weight would be the liar's choice.

    Source: Yin et al., arXiv 1803.01498, definition 2 and algorithm 1.
    """

    def aggregate(self, current: AdapterState, updates: Sequence[Update]) -> AdapterState:
        """Current plus the trimmed mean."""
        return FedAvg.apply(self, current, trimmed_mean(updates, self.settings.trim))


@STRATEGIES.register("median")
class Median(_OfSingles):
    """Adds, value by value, the median change.

    Equals: the change of the middle member, value by value. As long as fewer than half lie, every
    value lies between the smallest and the largest honest one.
    Does not equal: fedavg; on different data the median may serve nobody's rows well, and with two
    members it is their plain mean.

    Source: Yin et al., arXiv 1803.01498, definition 1 and algorithm 1.
    """

    def aggregate(self, current: AdapterState, updates: Sequence[Update]) -> AdapterState:
        """Current plus the median."""
        return FedAvg.apply(self, current, median(updates))


@STRATEGIES.register("svd")
class Svd(_OfSingles):
    """Averages the products B A, and factors the mean again.

    Equals: the weighted mean of the members' updates to the model, exactly where that has at most
    the adapter's rank (one member; members that agree), else its best approximation of that rank
    in the Frobenius norm (Eckart and Young, 1936). `lora_alpha / rank` cancels.
    Does not equal: fedavg; the new B and A are balanced factors, not means of B and of A, so a
    member's own optimizer state does not fit them.
    """

    needs_lora: ClassVar[bool] = True

    def aggregate(self, current: AdapterState, updates: Sequence[Update]) -> AdapterState:
        """New factors of every layer; keys that are no LoRA factor are averaged."""
        having = by_key(updates)
        pairs = {key: _other_factor(key) for key in having if ".lora_A." in key}
        for key_a, key_b in pairs.items():
            _check_pair(key_a, key_b, having)
        factored = {*pairs, *pairs.values()}
        rest = [_without(update, factored) for update in updates]
        new = FedAvg.apply(self, current, weighted_mean(rest))
        for key_a, key_b in pairs.items():
            if total_weight(having[key_a]) > 0:
                new[key_b], new[key_a] = _factors_of_mean(current, having[key_a], key_a, key_b)
        return new


def _factors_of_mean(
    current: AdapterState, updates: Sequence[Update], key_a: str, key_b: str
) -> tuple[Tensor, Tensor]:
    total = total_weight(updates)
    factors = [
        (
            update.weight / total,
            current[key_b].double() + update.state[key_b].double(),
            current[key_a].double() + update.state[key_a].double(),
        )
        for update in updates
    ]
    return refactored(factors, current[key_a])


def _check_pair(key_a: str, key_b: str, having: Mapping[str, Sequence[Update]]) -> None:
    with_a = {update.member for update in having[key_a]}
    with_b = {update.member for update in having.get(key_b, [])}
    if with_a != with_b:
        raise ProtocolError(
            f"members {sorted(with_a ^ with_b)} sent one of {key_a} and {key_b} without the other"
        )


def _without(update: Update, keys: set[str]) -> Update:
    state = {key: value for key, value in update.state.items() if key not in keys}
    return Update(member=update.member, weight=update.weight, state=state)


def _other_factor(key: str) -> str:
    return key.replace(".lora_A.", ".lora_B.")
