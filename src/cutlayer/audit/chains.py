"""Rows as the attacker sees them: what was sent in pieces is joined, what came twice is one.

It does not look into vectors beyond comparing their bytes.

Shapes: L = vectors of one row, D = hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.attack import Guess
from cutlayer.audit.evidence import Observation

__all__ = ["Chain", "chains", "guesses_of", "known_places", "nothing_of"]


@dataclass(kw_only=True)
class Chain:
    """Observations that continue one another, from the first token of a row on."""

    pieces: list[Observation] = field(default_factory=list)
    """In their order; the first starts at 0 unless its beginning was not recorded."""

    @property
    def h_LD(self) -> Tensor:
        """All vectors."""
        return torch.cat([piece.h_LD for piece in self.pieces]).float()

    @property
    def length(self) -> int:
        """L."""
        return sum(len(piece.h_LD) for piece in self.pieces)

    @property
    def has_beginning(self) -> bool:
        """Whether the first token's vector is there."""
        return self.pieces[0].start == 0

    @property
    def end(self) -> int:
        """Position behind the last vector."""
        return self.pieces[-1].start + len(self.pieces[-1].h_LD)


def chains(observations: Iterable[Observation]) -> list[Chain]:
    """Join what continues an earlier piece; training rows stay alone.

    A conversation's pieces carry no name, so a piece continues the chain that ends where it starts
    and was continued last (a chat goes on before others do).
    """
    found: list[Chain] = []
    for seen in observations:
        open_chains = [chain for chain in found if seen.start and chain.end == seen.start]
        mine = [c for c in open_chains if c.pieces[-1].phase == seen.phase]
        if mine:
            chain = max(mine, key=lambda chain: chain.pieces[-1].number)
            chain.pieces.append(seen)
        else:
            found.append(Chain(pieces=[seen]))
    return found


def known_places(chain: Chain, template: Sequence[int]) -> dict[int, int]:
    """Where the template's tokens stand: at the end of the piece that has the row's beginning."""
    length = len(chain.pieces[0].h_LD)
    if not chain.has_beginning or length <= len(template):
        return {}
    first = length - len(template)
    return {first + index: token for index, token in enumerate(template)}


def nothing_of(chain: Chain) -> list[Guess]:
    """For a chain that time did not reach."""
    return guesses_of(chain, [-1] * chain.length, [0.0] * chain.length, 0, chain.length)


def guesses_of(
    chain: Chain,
    tokens: Sequence[int],
    confidences: Sequence[float],
    num_fallbacks: int = 0,
    num_unfinished: int = 0,
) -> list[Guess]:
    """A guess for each piece of a chain; counts are said of the first one."""
    guesses, begin = [], 0
    for piece in chain.pieces:
        end = begin + len(piece.h_LD)
        guesses.append(
            Guess(
                number=piece.number,
                tokens=tuple(tokens[begin:end]),
                confidences=tuple(confidences[begin:end]),
                num_fallbacks=num_fallbacks if begin == 0 else 0,
                num_unfinished=num_unfinished if begin == 0 else 0,
            )
        )
        begin = end
    return guesses
