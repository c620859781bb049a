"""Rows of the public embedding as vectors are compared with them.

It does not run blocks.

Shapes: L = vectors of one row, D = hidden size, V = vocabulary.
"""

import torch
from torch import Tensor

__all__ = ["nearest_rows", "rows_of"]

_BLOCK = 64
"""Vectors compared with the whole vocabulary at a time."""


def nearest_rows(x_LD: Tensor, rows_VD: Tensor) -> tuple[list[int], list[float]]:
    """The nearest row for each vector, and how sure that is.

    Returns:
        tokens, and for each the softmax share of its row under normal noise of the variance that
        the residual itself shows.
    """
    tokens: list[int] = []
    shares: list[float] = []
    squares_V = rows_VD.square().sum(1)
    for block_LD in x_LD.split(_BLOCK):
        square_LV = squares_V - 2 * block_LD @ rows_VD.T + block_LD.square().sum(1, keepdim=True)
        best_L, tokens_L = square_LV.clamp(min=0).min(1)
        variance_L1 = (best_L[:, None] / rows_VD.shape[1]).clamp(min=1e-12)
        shares_LV = (-square_LV / (2 * variance_L1)).softmax(1)
        tokens += tokens_L.tolist()
        shares += shares_LV.gather(1, tokens_L[:, None])[:, 0].tolist()
    return tokens, shares


def rows_of(embed: torch.nn.Module) -> Tensor:
    """What an embedding module makes of every token, its own scale included, [V, D]."""
    weight = embed.get_parameter("weight")
    with torch.no_grad():
        rows_VD: Tensor = embed(torch.arange(len(weight), device=weight.device))
    return rows_VD.float()
