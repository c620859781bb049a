"""One mean per key of what members trained at their clients and what the server did for them.

With one cut for all no key is in both; with mixed cuts a block is in both. Pure arithmetic: it
knows neither rounds nor secrecy (`rounds`).
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cutlayer.federation.aggregation import (
    Update,
    by_key,
    mean_gradient,
    total_weight,
    weighted_mean,
)
from cutlayer.federation.cuts import is_share, share_of
from cutlayer.model.adapters import AdapterState

__all__ = ["mean_of_all", "pooled_change", "pooled_gradient"]


def pooled_change(
    mean: Mapping[str, Tensor], num_tokens: int, trunk: Sequence[Update]
) -> AdapterState:
    """Mean changes over all who trained a key, where clients' updates are known as a mean alone.

    Over members i who hold a key at their client (c) and those j for whom the server trains it:
    (sum_i w_i x_i + sum_j w_j x_j) / (sum_i w_i + sum_j w_j). The clients' mean m is over all
    weight W with zeros for who lacks the key, so sum_i w_i x_i = W m and sum_i w_i = W s, where s
    is the share of the key's block (`cuts.share_of`).

    Args:
        mean: m by key, and the shares.
        num_tokens: W.
        trunk: the server's, by member.

    Raises:
        ProtocolError: a share that no honest members can have made.
    """
    at_server, pooled = by_key(trunk), weighted_mean(trunk)
    for key, mean_x in mean.items():
        share = share_of(key, mean)
        if is_share(key) or share == 0:
            continue
        having = at_server.get(key, [])
        if not having and share == 1:
            pooled[key] = mean_x
            continue
        weighted = [update.state[key].double() * update.weight for update in having]
        summed = sum(weighted, mean_x.double() * num_tokens)
        # The product is a number of tokens up to rounding.
        weight = round(share * num_tokens) + total_weight(having)
        if weight > 0:
            pooled[key] = (summed / weight).float()
    return pooled


def pooled_gradient(
    mean: Mapping[str, Tensor], num_tokens: int, trunk: Sequence[Update]
) -> AdapterState:
    """The gradient of the mean loss over all members' tokens, wherever a key was trained.

    Args:
        mean: clients' gradients of the summed loss over all tokens, by key; who lacks a key adds
            nothing.
        num_tokens: scored tokens of all.
        trunk: the server's gradients of the summed loss; weights do not count.
    """
    if num_tokens == 0:
        return {}
    pooled = {key: mean_x for key, mean_x in mean.items() if not is_share(key)}
    for key, at_server in mean_gradient(trunk, num_tokens).items():
        pooled[key] = at_server if key not in pooled else pooled[key].double() + at_server
    return pooled


def mean_of_all(updates: Sequence[Update], num_tokens: int) -> AdapterState:
    """Weighted sums over all tokens, in float64: who lacks a key counts as zero there."""
    if num_tokens == 0:
        return {}
    sums: AdapterState = {}
    for key, having in by_key(updates).items():
        weighted = [update.state[key].double() * update.weight for update in having]
        sums[key] = sum(weighted[1:], weighted[0]) / num_tokens
    return sums
