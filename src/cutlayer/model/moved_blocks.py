"""Weights and moments of blocks that change sides: which belong to a block, and whether all came.

It sends and stores nothing (`client.recut`, `server.recut`).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cutlayer.errors import ModelError, ProtocolError

__all__ = ["block_of", "check_moved", "moments_of", "of_blocks"]

_BLOCK = re.compile(r"base_model\.model\.(?:[A-Za-z_]\w*\.)+?(?P<block>\d+)\.")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def block_of(key: str) -> int:
    """Global index of the block that a key of an adapter's state belongs to.

    Raises:
        ModelError: it names no block.
    """
    match = _BLOCK.match(key)
    if match is None:
        raise ModelError(f"{key:.100} belongs to no block of the model, so it cannot move with one")
    return int(match["block"])


def of_blocks(state: Mapping[str, Tensor], blocks: Collection[int]) -> dict[str, Tensor]:
    """Weights, or moments, of these blocks, sorted by key."""
    return {key: state[key] for key in sorted(state) if block_of(key) in blocks}


def moments_of(moments: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """What an optimizer keeps of these weights, sorted by name."""
    wanted = set(keys)
    return {name: moments[name] for name in sorted(moments) if _weight_of(name) in wanted}


def check_moved(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    layout: Mapping[str, Sequence[int]],
    sender: str,
) -> None:
    """Refuse weights and moments that are not exactly those of the blocks that move.

    Args:
        weights: what came, by key.
        moments: what came, by `KEY.exp_avg` and so on; none of a weight that never stepped.
        layout: key -> shape of what had to come.
        sender: for the message.

    Raises:
        ProtocolError: a tensor is missing, unknown, of another shape or type, not finite, or
            no moment that AdamW can have.
    """
    shapes = {key: list(shape) for key, shape in layout.items()}
    if weights.keys() != shapes.keys():
        wrong = sorted(weights.keys() ^ shapes.keys())
        raise ProtocolError(
            f"the {sender} sent other weights than the moved blocks have: {wrong[:3]} of "
            f"{len(wrong)}; were the kinds, the targets or the model changed?"
        )
    for name in moments:
        key, kind = _weight_of(name), name.rpartition(".")[2]
        if key not in shapes or kind not in _MOMENTS:
            raise ProtocolError(f"the {sender} sent {name:.150}, which no moved weight has")
        others = [f"{key}.{other}" for other in _MOMENTS]
        if not moments.keys() >= set(others):
            raise ProtocolError(f"the {sender} sent some moments of {key:.150} and not all")
        shapes[name] = [] if kind == "step" else shapes[key]
    for name, x in {**weights, **moments}.items():
        if x.dtype != torch.float32 or list(x.shape) != shapes[name]:
            raise ProtocolError(
                f"the {sender} sent {name:.150} as {x.dtype} {list(x.shape)}, expected is float32 "
                f"{shapes[name]}"
            )
        if not bool(x.isfinite().all()):
            raise ProtocolError(f"the {sender} sent {name:.150} with NaN or infinite values")
        if name in moments and not _can_be(name.rpartition(".")[2], x):
            raise ProtocolError(f"the {sender} sent {name:.150} with values that AdamW never has")


def _can_be(kind: str, x: Tensor) -> bool:
    """Squares and counts of steps: with others the next step makes every weight NaN."""
    if kind == "step":
        return bool((x >= 1) & (x == x.floor()))
    return kind != "exp_avg_sq" or bool((x >= 0).all())


def _weight_of(moment: str) -> str:
    return moment.rpartition(".")[0]
