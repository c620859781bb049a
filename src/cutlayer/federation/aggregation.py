"""Arithmetic on members' updates, key by key: checks, means, ranks. No rule is chosen here.

It does not know rounds, secrecy or optimizers (`strategy`). Sums are in float64 and over members
in the order of their names, so the order of arrival changes no bit; results are float32.

Shapes: M = members that have the key; any further dimensions are the tensor's own.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.model.adapters import AdapterState

__all__ = [
    "Update",
    "by_key",
    "check_state",
    "is_finite",
    "mean_gradient",
    "median",
    "total_weight",
    "trimmed_mean",
    "weighted_mean",
]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one member learnt on one part or several."""

    member: str
    """The member's name."""
    weight: float
    """Scored tokens."""
    state: AdapterState
    """Change of the weights, or mean gradient, by key; other members may have other keys."""


def check_state(
    member: str, state: Mapping[str, Tensor], layout: Mapping[str, Sequence[int]]
) -> None:
    """Refuse an update that does not fit.

    Args:
        member: whose it is, for the message.
        state: the update.
        layout: wanted keys and shapes.

    Raises:
        ProtocolError: a key is missing or unknown, a shape or type differs, a value is NaN or
            infinite; the message names the member and the key, never a value.
    """
    if state.keys() != layout.keys():
        missing, extra = sorted(layout.keys() - state.keys()), sorted(state.keys() - layout.keys())
        raise ProtocolError(
            f"update of member {member} does not fit: {len(missing)} keys missing {missing[:2]}, "
            f"{len(extra)} unknown {extra[:2]}; train what the federation's policy says"
        )
    for key, tensor in state.items():
        if tuple(tensor.shape) != tuple(layout[key]) or tensor.dtype != torch.float32:
            raise ProtocolError(
                f"update of member {member}: {key} is {tensor.dtype} {list(tensor.shape)}, "
                f"wanted float32 {list(layout[key])}"
            )
        if not is_finite(tensor):
            raise ProtocolError(
                f"update of member {member}: {key} holds NaN or infinite values and is not taken; "
                "lower the member's learning rate"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())


def by_key(updates: Sequence[Update]) -> dict[str, list[Update]]:
    """For every key, sorted, the updates that have it, sorted by member."""
    ordered = sorted(updates, key=lambda update: update.member)
    keys = sorted({key for update in ordered for key in update.state})
    return {key: [update for update in ordered if key in update.state] for key in keys}


def total_weight(updates: Iterable[Update]) -> float:
    """Sum of weights; exact for token counts."""
    return math.fsum(update.weight for update in updates)


def weighted_mean(updates: Sequence[Update]) -> AdapterState:
    """Per key, the mean over members that have it, weighted by scored tokens.

    mean = sum_i w_i x_i / sum_i w_i. A key whose weights are all zero is left out.
    """
    mean = {}
    for key, having in by_key(updates).items():
        total = total_weight(having)
        if total > 0:
            weighted = (update.state[key].double() * update.weight for update in having)
            mean[key] = (_sum(weighted) / total).float()
    return mean


def mean_gradient(updates: Sequence[Update], num_tokens: int) -> AdapterState:
    """Sums of gradients of summed losses, over all tokens of a round; weights do not count."""
    if num_tokens == 0:
        return {}
    return {
        key: (_sum(update.state[key].double() for update in having) / num_tokens).float()
        for key, having in by_key(updates).items()
    }


def trimmed_mean(updates: Sequence[Update], trim: float) -> AdapterState:
    """Per value, the mean of what is left without the largest and the smallest.

    k = ceil(trim * M) values go at each end, at most as many as leave one or two. Weights do not
    count: a liar would choose its own.

    Source: Yin et al., arXiv 1803.01498, definition 2.
    """
    return {key: _trimmed(_stacked(key, having), trim) for key, having in by_key(updates).items()}


def median(updates: Sequence[Update]) -> AdapterState:
    """Per value, the median; of an even number, the mean of the middle two. Weights do not count.

    Source: Yin et al., arXiv 1803.01498, definition 1.
    """
    # Cutting off as much as can be cut leaves the middle one or two.
    return trimmed_mean(updates, trim=0.5)


def _trimmed(sorted_M: Tensor, trim: float) -> Tensor:
    num_members = len(sorted_M)
    # The small term undoes products such as 0.07 * 100 = 7.000000000000001.
    num_cut = min(math.ceil(trim * num_members - 1e-9), (num_members - 1) // 2)
    return sorted_M[num_cut : num_members - num_cut].mean(0).float()


def _stacked(key: str, having: Sequence[Update]) -> Tensor:
    return torch.stack([update.state[key].double() for update in having]).sort(0).values


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    assert total is not None
    return total
