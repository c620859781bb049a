"""From what an attempt brought to the next state; pure arithmetic between strategy and trunk.

It does not know phases or deadlines (`running`), nor where states are kept (`store`).

Shapes: N = values of an update of head and tail, M = N + 1 with the weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cutlayer.federation.aggregation import Update, is_finite, weighted_mean
from cutlayer.federation.pooling import mean_of_all, pooled_change, pooled_gradient
from cutlayer.federation.rules import Rules
from cutlayer.federation.state import owned_state
from cutlayer.federation.strategy import Strategy
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterState

__all__ = ["Collected", "TrunkContributions", "next_state", "trunk_contributions"]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Head and tail of an attempt that succeeded; one of `updates`, `mean`, `hidden_sum`."""

    survivors: tuple[str, ...]
    """Whose updates are in it, sorted."""
    updates: tuple[Update, ...] | None = None
    """In the open: every member's."""
    mean: AdapterState | None = None
    """Secure: the weighted mean."""
    hidden_sum: Tensor | None = None
    """Hidden: the padded sum [M], which says nothing to the server."""
    total_weight: int = 0
    """Scored tokens; 0 where the server does not know."""
    sealed: bytes = b""
    """Hidden: the state before, as one of the survivors sealed it."""


@dataclass(frozen=True, kw_only=True)
class TrunkContributions:
    """The trunk's side of an attempt."""

    updates: tuple[Update, ...] = ()
    """Changes, or gradients of the summed loss, under their owners' keys."""
    refused: tuple[str, ...] = field(default=())
    """Members whose contribution was NaN or infinite, and is left out."""

    @property
    def outcome(self) -> str:
        """For the store's row of the attempt."""
        if not self.refused:
            return "finished"
        return f"finished; NaN in the trunk's updates of {', '.join(self.refused)}, left out"


def trunk_contributions(
    rules: Rules, state: AdapterState, kind: UpdateKind, collected: Mapping[str, TrunkUpdate]
) -> TrunkContributions:
    """What the trunk pool brought, as updates.

    Args:
        rules: of the federation.
        state: at the round's start.
        kind: whether the pool's tensors are trained weights or gradients.
        collected: by member.
    """
    updates, refused = [], []
    for member in sorted(collected):
        brought = collected[member]
        changed = _changed(rules, state, member, brought.state, kind)
        if all(is_finite(tensor) for tensor in changed.values()):
            owned = owned_state(rules.owner(member), changed)
            # A member tells the trunk its tokens: no more of them count than at head and tail.
            weight = min(brought.weight, rules.settings.secure.max_weight)
            updates.append(Update(member=member, weight=weight, state=owned))
        else:
            refused.append(member)
    return TrunkContributions(updates=tuple(updates), refused=tuple(refused))


def next_state(
    strategy: Strategy, state: AdapterState, ends: Collected, trunk: TrunkContributions
) -> AdapterState:
    """Head, tail and trunk after the round.

    A key is averaged over all who trained it, at their clients or at the server. Deltas of the
    trunk are averaged by the scored tokens that reached it. Gradients are summed and
    divided by the whole round's tokens, as those of head and tail are: so all parts take the step
    of one model on the mean loss over the union of the rows.

    Args:
        strategy: the federation's rule.
        state: at the round's start, complete for every survivor's trunk.
        ends: head and tail.
        trunk: the trunk.
    """
    if strategy.needs_single_updates:
        assert ends.updates is not None
        return strategy.aggregate(state, [*ends.updates, *trunk.updates])
    takes_changes = strategy.sends is UpdateKind.DELTA
    pool = _mean_change if takes_changes else _mean_gradient
    return strategy.apply(state, pool(ends, trunk.updates))


def _mean_change(ends: Collected, trunk: Sequence[Update]) -> AdapterState:
    if ends.updates is not None:
        return weighted_mean([*ends.updates, *trunk])
    return pooled_change(ends.mean or {}, ends.total_weight, trunk)


def _mean_gradient(ends: Collected, trunk: Sequence[Update]) -> AdapterState:
    mean = ends.mean or {}
    if ends.updates is not None:
        mean = mean_of_all(ends.updates, ends.total_weight)
    return pooled_gradient(mean, ends.total_weight, trunk)


def _changed(
    rules: Rules, state: AdapterState, member: str, brought: AdapterState, kind: UpdateKind
) -> AdapterState:
    keys = [key for key in brought if not (rules.freezes_a and ".lora_A." in key)]
    if kind is UpdateKind.GRADIENT:
        return {key: brought[key] for key in keys}
    start = rules.trunk_of(state, member)
    return {key: brought[key].cpu().float() - start[key] for key in keys}
