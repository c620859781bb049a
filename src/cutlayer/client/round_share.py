"""A member's part of one attempt of a round: what it trains, and in which layout all hand in.

It does not train (`member`), mask (`handing_in`) nor keep the chain of rounds (`membership`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.federation.cuts import Cuts, cut_text, is_share, read_cuts, vector_layout
from cutlayer.federation.state import update_layout
from cutlayer.model.cut import Cut
from cutlayer.wire.federation_messages import Round

__all__ = ["Adapters", "RoundShare", "check_mixed", "round_share"]


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What the adapters of head and tail consist of."""

    layout: dict[str, list[int]]
    """Key and shape of every tensor."""
    cut: Cut
    """Where this member is cut; it matters where members' cuts are mixed."""


@dataclass(frozen=True, kw_only=True)
class RoundShare:
    """A member's part of one attempt."""

    update: dict[str, list[int]]
    """What it trains at its client: key and shape."""
    vector: dict[str, list[int]]
    """What all members of the attempt mask, in one layout."""
    cuts: Cuts
    """Of the cohort, where they are mixed; else empty."""
    cut: Cut
    """Its own."""


def round_share(
    adapters: Adapters, begun: Round, start: Mapping[str, Tensor], freezes_a: bool
) -> RoundShare:
    """What a member trains and hands in.

    Args:
        adapters: its own.
        begun: the attempt.
        start: the whole state that the attempt begins with; empty where all have one cut.
        freezes_a: whether the strategy keeps LoRA's A as it was drawn.
    """
    own = update_layout(adapters.layout, freezes_a)
    if not start:
        return RoundShare(update=own, vector=own, cuts={}, cut=adapters.cut)
    whole = update_layout({key: list(x.shape) for key, x in start.items()}, freezes_a)
    cuts = read_cuts(begun.cuts)
    vector = vector_layout(whole, cuts)
    return RoundShare(update=own, vector=vector, cuts=cuts, cut=adapters.cut)


def check_mixed(name: str, adapters: Adapters, begun: Round, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a round of mixed cuts that says something else of this member than it is.

    Raises:
        ProtocolError: its cut or its adapters are not those of the round.
    """
    cuts = read_cuts(begun.cuts)
    if sorted(cuts) != sorted(begun.cohort):
        raise ProtocolError(f"round {begun.round} does not say one cut for each of its cohort")
    if not begun.is_finished and cuts.get(name) != adapters.cut:
        raise ProtocolError(
            f"round {begun.round} was begun for {name} with another cut than "
            f"{cut_text(adapters.cut)}: join again; if that does not help, ask the operator"
        )
    found = {key: list(x.shape) for key, x in tensors.items()}
    wrong = sorted(k for k, shape in adapters.layout.items() if found.get(k) != shape)
    if wrong or any(is_share(key) for key in found):
        raise ProtocolError(
            f"round {begun.round} came without this member's adapters, such as "
            f"{(wrong or ['those of other names'])[0]}; nothing was trained on it"
        )
