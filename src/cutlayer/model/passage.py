"""Rows that enter and leave one trunk at different blocks, together wherever they meet.

It does not keep graphs or sessions, nor know clients: whoever calls decides who travels together.

Shapes: N = tokens of one traveller or of all, D = hidden size.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutlayer.model.adapter_slots import DropoutDraws, Segment
from cutlayer.model.adapters import use_segments
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import Rows

__all__ = ["Traveller", "joined_rows", "pass_through"]


@dataclass(frozen=True, kw_only=True)
class Traveller:
    """Rows of one adapter, and the run of blocks that they take."""

    h_ND: Tensor
    """What enters the first of the blocks, of the dtype and on the device of the trunk."""
    rows: Rows
    blocks: range
    """Global indices."""
    segment: Segment
    """Whose adapter acts on them."""
    caches: Sequence[RowCache] = ()
    """One per row; none where nothing is cached."""


def pass_through(trunk: Trunk, travellers: Sequence[Traveller]) -> Tensor:
    """What leaves the last block of each, [N, D] of all in their order.

    Every stretch of blocks between two places where somebody enters or leaves is one call of the
    trunk for all who are there. All or none have caches, which are cut back to the rows' starts.
    """
    if len({traveller.blocks for traveller in travellers}) == 1:
        return _stretch(trunk, travellers, travellers[0].blocks)
    under_way = [_continued(traveller) for traveller in travellers]
    edges = sorted({edge for t in travellers for edge in (t.blocks.start, t.blocks.stop)})
    for start, stop in itertools.pairwise(edges):
        here = [i for i, t in enumerate(under_way) if start in t.blocks]
        if not here:
            continue
        met = [under_way[index] for index in here]
        y_ND = _stretch(trunk, met, range(start, stop))
        pieces = y_ND.split([traveller.rows.num_tokens for traveller in met])
        for index, piece_ND in zip(here, pieces, strict=True):
            under_way[index] = replace(under_way[index], h_ND=piece_ND)
    return torch.cat([traveller.h_ND for traveller in under_way])


def joined_rows(rows: Sequence[Rows]) -> Rows:
    """One packed order of several."""
    return Rows(
        lengths=tuple(length for part in rows for length in part.lengths),
        starts=tuple(start for part in rows for start in part.starts),
    )


def _stretch(trunk: Trunk, travellers: Sequence[Traveller], blocks: range) -> Tensor:
    """One call of the trunk; [N, D] of all."""
    rows = joined_rows([traveller.rows for traveller in travellers])
    caches = [cache for traveller in travellers for cache in traveller.caches]
    for cache, start in zip(caches, rows.starts, strict=False):
        # The stretch before has counted the new tokens already.
        cache.truncate(start)
    states = [traveller.h_ND for traveller in travellers]
    h_ND = states[0] if len(states) == 1 else torch.cat(states)
    with use_segments(trunk, [traveller.segment for traveller in travellers]):
        y_ND: Tensor = trunk(h_ND, rows, caches or None, blocks)
    return y_ND


def _continued(traveller: Traveller) -> Traveller:
    """With dropout that draws on from stretch to stretch, the same whoever else is there."""
    seed = traveller.segment.dropout_seed
    if seed is None:
        return traveller
    return replace(traveller, segment=replace(traveller.segment, draws=DropoutDraws(seed)))
