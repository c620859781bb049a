"""The loss on the tokens that are scored, as a sum: whoever steps divides.

It does not step, average or choose what is scored, and nothing of it ever leaves its holder.

Shapes: N = tokens of all rows, D = hidden size, S = scored places, V = vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Tail
from cutlayer.model.rows import Rows

__all__ = ["NOT_SCORED", "completion_loss_sum", "loss_sum_at", "scored_places"]

NOT_SCORED = -100
"""The label of a token that nobody has to predict."""


def completion_loss_sum(
    tail: Tail,
    y_ND: Tensor,
    rows: Rows,
    labels_N: Tensor,
    caches: Sequence[RowCache] | None = None,
) -> tuple[Tensor, int]:
    """Summed cross entropy, in float32, of the scored tokens; the LM head runs on these alone.

    Args:
        tail: blocks, norm and LM head.
        y_ND: the trunk's output.
        rows: layout of the packed rows.
        labels_N: int64, aligned with the tokens (not shifted); -100 is not scored. The token
            before a scored one, in the same row, predicts it; a row's first has no predictor.
        caches: of the tail, one per row.

    Returns:
        The sum (a scalar in the graph of `y_ND`) and the number of scored tokens S.

    Raises:
        ConfigError: labels do not fit the rows.
    """
    places_S, targets_S = scored_places(rows, labels_N)
    return loss_sum_at(tail, y_ND, rows, places_S, targets_S, caches), len(places_S)


def loss_sum_at(
    tail: Tail,
    y_ND: Tensor,
    rows: Rows,
    places_S: Tensor,
    targets_S: Tensor,
    caches: Sequence[RowCache] | None = None,
) -> Tensor:
    """Summed cross entropy, in float32, of what these places predict; a scalar.

    Args:
        tail: blocks, norm and LM head.
        y_ND: the trunk's output.
        rows: layout of the packed rows.
        places_S: int64, places in the packed order.
        targets_S: int64, the token that each predicts.
        caches: of the tail, one per row.
    """
    if not len(places_S):
        # Still in the graph, so that a batch without scored tokens steps back like any other.
        return y_ND.float().sum() * 0.0
    logits_SV = tail(y_ND, rows, caches, select_N=places_S)
    targets_S = targets_S.to(logits_SV.device)
    return nn.functional.cross_entropy(logits_SV.float(), targets_S, reduction="sum")


def scored_places(rows: Rows, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The places that predict a scored token, and those tokens; int64 [S] each.

    Raises:
        ConfigError: labels do not fit the rows.
    """
    if labels_N.shape != (rows.num_tokens,):
        raise ConfigError(f"{tuple(labels_N.shape)} labels for {rows.num_tokens} tokens")
    is_scored_N = labels_N != NOT_SCORED
    is_scored_N[torch.tensor(rows.offsets[:-1], device=labels_N.device)] = False
    scored_S = is_scored_N.nonzero().squeeze(1)
    return scored_S - 1, labels_N[scored_S]
