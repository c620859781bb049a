"""Where the blocks of one model execute: an ordered chain of places. The U is one value of it.

It does not build parts (`partition`), connect or decide what is accepted of a peer (`client`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from cutlayer.errors import ConfigError

__all__ = ["Hop", "PlaceKind", "Placement", "check_trunks"]


class PlaceKind(StrEnum):
    """Who runs a stretch of blocks."""

    CLIENT = "client"
    """The data owner: tokens and, unless they are shared, labels."""
    SERVER = "server"
    """A trunk server; with or without evidence of what it runs."""
    MEMBER = "member"
    """Another data owner that hosts trunk blocks with `cutlayer serve`."""
    ENCLAVE = "enclave"
    """The last blocks and the LM head at a place that proves what it runs."""


@dataclass(frozen=True)
class Hop:
    """One place of a chain and its blocks."""

    place: PlaceKind
    blocks: range
    """Global indices; empty only at the client's two ends."""

    def __str__(self) -> str:
        if not self.blocks:
            return f"{self.place} (no block)"
        last = self.blocks.stop - 1
        first = self.blocks.start
        return (
            f"{self.place} (block {first})"
            if first == last
            else (f"{self.place} (blocks {first} to {last})")
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All blocks of a model, in order: who runs which."""

    num_blocks: int
    hops: tuple[Hop, ...]
    shares_labels: bool = False
    """The owner accepts that the last place computes the loss without proving what it runs."""

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            ConfigError: says which hop is wrong and what to do.
        """
        self._check_places()
        check_trunks(self.trunks, *self._edges)
        self._check_ends()

    @classmethod
    def u_shaped(cls, lower: int, upper: int, num_blocks: int) -> "Placement":
        """Client, one trunk server, client: blocks [lower, upper) are the server's."""
        trunk = Hop(PlaceKind.SERVER, range(lower, upper))
        return cls.around([trunk], num_blocks)

    @classmethod
    def around(cls, trunks: Sequence[Hop], num_blocks: int) -> "Placement":
        """The client's head and tail around these trunks."""
        if not trunks:
            raise ConfigError("a placement without a trunk: name at least one place beside yours")
        head = Hop(PlaceKind.CLIENT, range(trunks[0].blocks.start))
        tail = Hop(PlaceKind.CLIENT, range(trunks[-1].blocks.stop, num_blocks))
        return cls(num_blocks=num_blocks, hops=(head, *trunks, tail))

    @property
    def shape(self) -> str:
        """The places' names in order, such as client-server-client."""
        return "-".join(hop.place for hop in self.hops)

    @property
    def has_tail_at_client(self) -> bool:
        """Whether the last blocks, the LM head and the labels are the owner's."""
        return self.hops[-1].place is PlaceKind.CLIENT

    @property
    def trunks(self) -> tuple[Hop, ...]:
        """The places in the middle: hidden states in, hidden states out."""
        return self.hops[1:-1]

    @property
    def _edges(self) -> tuple[int, int]:
        return self.hops[0].blocks.stop, self.hops[-1].blocks.start

    def _check_places(self) -> None:
        places = [hop.place for hop in self.hops]
        if len(places) < 2 or places[0] is not PlaceKind.CLIENT:
            raise ConfigError(
                f"a placement {'-'.join(places) or 'without places'}: the client is first, as "
                "tokens stay with the data owner, and at least one other place follows"
            )
        if PlaceKind.CLIENT in places[1:-1]:
            raise ConfigError(
                f"a placement {self.shape}: the client has the first blocks and may have the last "
                "ones; give blocks in the middle to a server or a member"
            )
        if PlaceKind.ENCLAVE in places[:-1]:
            raise ConfigError(
                f"a placement {self.shape}: an enclave holds the last blocks with the LM head; an "
                "attested trunk in the middle is a server with a section [hops.tee]"
            )
        if self.has_tail_at_client and not self.trunks:
            raise ConfigError("a placement without a trunk: name at least one place beside yours")

    def _check_ends(self) -> None:
        first, last = self.hops[0], self.hops[-1]
        furthest = max(max(hop.blocks.start, hop.blocks.stop) for hop in self.hops)
        if furthest > self.num_blocks:
            raise ConfigError(
                f"a placement of blocks before {furthest}; the model has {self.num_blocks}: lower "
                "the hops' upper and model.upper"
            )
        if first.blocks.start != 0 or last.blocks.stop != self.num_blocks:
            raise ConfigError(
                f"a placement of blocks {first.blocks.start} to {last.blocks.stop - 1} of a model "
                f"of {self.num_blocks}: every block needs a place, from 0 to {self.num_blocks - 1}"
            )
        if last.place is not PlaceKind.CLIENT and not last.blocks:
            raise ConfigError(f"the {last.place} at the end has no block; give it at least one")
        is_blind = last.place in (PlaceKind.SERVER, PlaceKind.MEMBER)
        if is_blind and not self.shares_labels:
            raise ConfigError(
                f"a placement {self.shape}: labels and the text's distribution would be visible "
                f"at the {last.place}, which proves nothing; keep the last blocks, take an "
                "enclave, or accept it in so many words"
            )


def check_trunks(trunks: Iterable[Hop], lower: int, upper: int) -> None:
    """Check the places between the owner's ends.

    Args:
        trunks: in order.
        lower: block at which the first begins.
        upper: block at which the last ends.

    Raises:
        ConfigError: a place without blocks, a hole, an overlap or a wrong order.
    """
    edge = Hop(PlaceKind.CLIENT, range(lower, lower))
    hops = [edge, *trunks, Hop(PlaceKind.CLIENT, range(upper, upper))]
    for number, hop in enumerate(hops[1:-1], start=1):
        if not hop.blocks:
            raise ConfigError(
                f"hop {number} ({hop.place}) has no block: lower={hop.blocks.start}, "
                f"upper={hop.blocks.stop}; give it lower < upper"
            )
    for number, (before, after) in enumerate(pairwise(hops)):
        _check_meeting(number, before.blocks.stop, after.blocks.start, number + 2 == len(hops))


def _check_meeting(number: int, end: int, begin: int, is_last: bool) -> None:
    if end == begin:
        return
    after = "the client's last blocks" if is_last else f"hop {number + 1}"
    before = f"hop {number}" if number else "the client's first blocks"
    if end < begin:
        missing = f"block {end}" if begin - end == 1 else f"blocks {end} to {begin - 1}"
        raise ConfigError(
            f"{missing} have no place: {before} ends before {end}, {after} begins at {begin}; "
            "let each hop begin where the one before ends"
        )
    raise ConfigError(
        f"{before} ends before block {end} and {after} begins at {begin}: blocks have two places "
        "or the hops are not in order; let each hop begin where the one before ends"
    )
