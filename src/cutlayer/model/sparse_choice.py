"""Which heads and rows of public weights learn in SPF: by L1 norm, from nothing but the weights.

It trains nothing (`sparse`). Client and server hold different blocks, members of a federation the
same ones: each computes the choice by itself, and the digest of it that keys carry shows whether
they agree.

Shapes: O and I = output and input features of a layer, R = chosen rows, G = key-value heads.

Source: Huang et al. (arXiv 2401.09796), sparsification parameter fine-tuning.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from cutlayer.model.adapter_settings import SparseSettings
from cutlayer.model.attention_heads import Heads

__all__ = ["choose_rows", "digest_of", "row_norms"]


def choose_rows(
    layers: Collection[str],
    heads: Heads | None,
    norms: Callable[[str], Tensor],
    settings: SparseSettings,
) -> dict[str, Tensor]:
    """The rows of one block that learn, int64 and ascending; layers without any are left out.

    Heads are chosen by key-value head: one learns with all query heads that attend to it. Of n
    heads or rows, ratio * n learn, rounded half up, and at least one where the ratio is not 0.

    Args:
        layers: names, within the block, of the layers that may learn.
        heads: the block's heads; None where no layer of it has any.
        norms: L1 norm of every row of a layer, [O].
        settings: how many, and which.
    """
    chosen = {}
    with_heads = set() if heads is None else heads.layers & set(layers)
    if heads is not None and with_heads and settings.qkv_ratio:
        found = {name: norms(name) for name in heads.layers}
        scores_G = torch.stack([_norm_of(group, found) for group in heads.groups])
        groups = [heads.groups[g] for g in _chosen(scores_G, settings.qkv_ratio, settings.choose)]
        for name in with_heads:
            rows = sorted(row for group in groups for span in group[name] for row in span)
            chosen[name] = torch.tensor(rows, dtype=torch.int64)
    for name in sorted(set(layers) - with_heads) if settings.dense_ratio else ():
        rows = _chosen(norms(name), settings.dense_ratio, settings.choose)
        chosen[name] = torch.tensor(rows, dtype=torch.int64)
    return chosen


def row_norms(weight: Tensor, is_transposed: bool) -> Tensor:
    """L1 norm of every row, float64 on the CPU, [O].

    Args:
        weight: [O, I], or [I, O] where it is transposed.
        is_transposed: whether it is.
    """
    # Without a copy of the whole layer in float64.
    dim = 0 if is_transposed else 1
    norms: Tensor = torch.linalg.vector_norm(weight, ord=1, dim=dim, dtype=torch.float64)
    return norms.cpu()


def digest_of(rows_R: Tensor) -> str:
    """Eight hex digits of the SHA-256 of a choice."""
    return hashlib.sha256(rows_R.numpy().astype("<i8").tobytes()).hexdigest()[:8]


def _chosen(scores: Tensor, ratio: float, choose: str) -> list[int]:
    """Ascending indices; of equal scores the lower index goes first."""
    count = max(1, int(ratio * len(scores) + 0.5))
    order = torch.argsort(scores, descending=choose == "largest", stable=True)
    return sorted(order[:count].tolist())


def _norm_of(group: Mapping[str, Sequence[range]], norms: Mapping[str, Tensor]) -> Tensor:
    pieces = [
        norms[name][span.start : span.stop].sum() for name in sorted(group) for span in group[name]
    ]
    return torch.stack(pieces).sum()
