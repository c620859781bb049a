"""Which tensors a member of a federation with different cuts trains itself, and which the server.

It averages nothing (`pooling`) and asks nobody. Blocks that the server does not hold are at every
client; any other block is at a client or at the server, as that member's cut says. Everything
here is a function of keys and cuts, so that all members and the server compute the same.

Shapes: N = values of the vector that members mask, the same keys in the same order for all.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.federation.state import Layout
from cutlayer.model.adapters import AdapterState
from cutlayer.model.cut import Cut

__all__ = [
    "Cuts",
    "Greeting",
    "bared_block",
    "block_of",
    "blocks_of",
    "check_shares",
    "client_part",
    "cut_text",
    "fill",
    "holders",
    "is_share",
    "num_holders",
    "read_cut",
    "read_cuts",
    "server_part",
    "share_of",
    "vector_layout",
    "write_cuts",
]

Cuts = Mapping[str, Cut]
"""Members' cuts, by name."""

_BLOCK = re.compile(r"\.(\d+)\.")
_SHARE = "share.block."
"""Before a block's index: the key under which members add up who holds the block."""


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What a member's connection agreed on in its handshake."""

    cut: Cut
    """The client's."""
    served: Cut
    """The blocks that the server holds."""
    root: str
    """Digest of the whole model: of the leaves that client and server know together."""


def block_of(key: str) -> int | None:
    """The global index of an adapter tensor's block; None where it is of no block."""
    found = _BLOCK.search(key)
    return None if found is None else int(found[1])


def blocks_of(layout: Layout) -> set[int]:
    """Global indices of all blocks that a layout has tensors of."""
    return {block for key in layout if (block := block_of(key)) is not None}


def client_part(layout: Layout, cut: Cut) -> dict[str, list[int]]:
    """Of a layout, what a member of this cut has at its client."""
    return {key: list(layout[key]) for key in sorted(layout) if _is_at_client(block_of(key), cut)}


def server_part(layout: Layout, cut: Cut) -> dict[str, list[int]]:
    """Of a layout, what the server trains for a member of this cut."""
    own = client_part(layout, cut)
    return {key: list(layout[key]) for key in sorted(layout) if key not in own}


def holders(block: int, cuts: Cuts) -> set[str]:
    """Members that have a block at their client."""
    return {member for member, cut in cuts.items() if _is_at_client(block, cut)}


def num_holders(own: Cut, blocks: Iterable[int], cuts: Cuts) -> tuple[int, int] | None:
    """Of a member's own blocks the one that the fewest hold.

    Args:
        own: the member's cut.
        blocks: of the whole model.
        cuts: of those among whom an update hides, its own included.

    Returns:
        The block and how many hold it; None where the client has no block.
    """
    counts = {block: len(holders(block, cuts)) for block in blocks if _is_at_client(block, own)}
    if not counts:
        return None
    rarest = min(counts, key=lambda block: (counts[block], block))
    return rarest, counts[rarest]


def bared_block(
    blocks: Iterable[int], asked: Cuts, left: Cuts, least: int
) -> tuple[int, int] | None:
    """A block whose holders have become too few to hide each other.

    Args:
        blocks: that some hold and the server may train for others.
        asked: cuts of those whose updates were to come.
        left: of those whose updates came.
        least: holders that are enough; where fewer were asked, all of these.

    Returns:
        The first such block and how many of its holders are left.
    """
    for block in sorted(blocks):
        num_left = len(holders(block, left))
        if 0 < num_left < min(least, len(holders(block, asked))):
            return block, num_left
    return None


def vector_layout(update: Layout, cuts: Cuts) -> dict[str, list[int]]:
    """What members of these cuts mask: whatever one of them holds, and who holds it.

    A key that a member lacks is zero in its vector. For every block that some hold and others do
    not, one more value says whether the member does, so the mean of these values is the share of
    all weight behind that block's mean, and neither needs a call of its own.

    Args:
        update: of the whole state, without what the strategy freezes.
        cuts: of all members of the attempt; empty where all have one cut.
    """
    if not cuts:
        return {key: list(shape) for key, shape in sorted(update.items())}
    counts = {block: len(holders(block, cuts)) for block in blocks_of(update)}
    held = {
        key: list(shape)
        for key, shape in sorted(update.items())
        if (block := block_of(key)) is None or counts[block]
    }
    partly = sorted(block for block, count in counts.items() if 0 < count < len(cuts))
    return {**held, **{f"{_SHARE}{block}": [1] for block in partly}}


def fill(update: Mapping[str, Tensor], layout: Layout, cut: Cut) -> AdapterState:
    """A member's update under all keys of `vector_layout`: zeros and ones where it says nothing."""
    filled = {}
    for key, shape in layout.items():
        if is_share(key):
            filled[key] = torch.tensor([float(_is_at_client(_share_block(key), cut))])
        else:
            filled[key] = update[key] if key in update else torch.zeros(tuple(shape))
    return filled


def is_share(key: str) -> bool:
    """Whether the key is no tensor's, but says who holds a block."""
    return key.startswith(_SHARE)


def share_of(key: str, mean: Mapping[str, Tensor]) -> float:
    """The share of all weight that is behind a key's mean.

    Raises:
        ProtocolError: no honest members can have made it.
    """
    share = mean.get(f"{_SHARE}{block_of(key)}")
    value = 1.0 if share is None else float(share)
    if not 0 <= value <= 1:
        raise ProtocolError(
            f"the members of block {block_of(key)} have {value:.3g} of all weight: a member sent a "
            "wrong vector; nothing of this sum is used"
        )
    return value


def check_shares(mean: Mapping[str, Tensor], value_range: float) -> None:
    """Refuse means that are larger than those who hold a block can have made them.

    Args:
        mean: by key, over all weight, and the shares.
        value_range: largest magnitude of one member's value.

    Raises:
        ProtocolError: no honest members can have made one of them.
    """
    for key, mean_x in mean.items():
        most = share_of(key, mean) * value_range
        # Of one rounding in float64.
        if not is_share(key) and float(mean_x.abs().max()) > most * (1 + 1e-9):
            raise ProtocolError(
                f"the mean of block {block_of(key)} exceeds what its members can have sent "
                f"({most:.3g}): a member sent a wrong vector; nothing of this sum is used"
            )


def cut_text(cut: Cut) -> str:
    """As fingerprints say it."""
    return f"{cut.lower}:{cut.upper}"


def read_cut(member: str, text: str) -> Cut:
    """What `cut_text` wrote.

    Raises:
        ProtocolError: it is no cut.
    """
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if found is None:
        raise ProtocolError(f"{member} names the cut {text[:40]!r}, which is not LOWER:UPPER")
    return _checked(member, [int(found[1]), int(found[2])])


def write_cuts(cuts: Cuts) -> dict[str, list[int]]:
    """As they travel, sorted by member."""
    return {member: [cuts[member].lower, cuts[member].upper] for member in sorted(cuts)}


def read_cuts(table: Mapping[str, list[int]]) -> dict[str, Cut]:
    """What `write_cuts` wrote.

    Raises:
        ProtocolError: one is no cut.
    """
    return {member: _checked(member, pair) for member, pair in sorted(table.items())}


def _checked(member: str, pair: list[int]) -> Cut:
    if len(pair) != 2:
        raise ProtocolError(f"the cut of {member[:63]} has {len(pair)} numbers, not two")
    try:
        return Cut(pair[0], pair[1])
    except ConfigError as error:
        raise ProtocolError(f"the cut of {member[:63]}: {error}") from error


def _is_at_client(block: int | None, cut: Cut) -> bool:
    return block is None or block not in cut.trunk


def _share_block(key: str) -> int:
    return int(key.removeprefix(_SHARE))
