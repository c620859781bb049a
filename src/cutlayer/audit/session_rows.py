"""Rows of generation as they grow over calls, are cut back, and are sent again.

It reads no frames (`observations`). Guesses of speculative decoding that were not taken are
forgotten; a row that is otherwise cut back was a text of its own up to there.

Shapes: L = vectors of one row, D = hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.evidence import Observation
from cutlayer.client.truth_file import vector_chain

__all__ = ["SessionRows"]

_MAX_GUESSES = 64
"""Of one round trip: the limit of `generation.speculation.max_tokens`."""

RowName = tuple[str, int]
"""Session and number in it."""


@dataclass(kw_only=True)
class _Piece:
    """What one call brought."""

    start: int
    h_LD: Tensor
    y_LD: Tensor | None
    digests: Sequence[bytes]

    @property
    def end(self) -> int:
        return self.start + len(self.digests)

    def up_to(self, position: int) -> "_Piece":
        length = position - self.start
        y_LD = None if self.y_LD is None else self.y_LD[:length]
        digests = self.digests[:length]
        return _Piece(start=self.start, h_LD=self.h_LD[:length], y_LD=y_LD, digests=digests)


@dataclass(kw_only=True)
class _Row:
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.pieces[-1].end if self.pieces else 0

    def drops_guesses(self, position: int) -> bool:
        """Whether cutting back to there takes away nothing but guesses of the last call."""
        last = self.pieces[-1]
        is_first = last.start == self.pieces[0].start
        return not is_first and position > last.start and len(last.digests) <= 1 + _MAX_GUESSES

    def cut_to(self, position: int) -> None:
        kept = [piece for piece in self.pieces if piece.start < position]
        self.pieces = [piece.up_to(min(position, piece.end)) for piece in kept]

    def observation(self) -> tuple[Observation, list[bytes]]:
        answers = [piece.y_LD for piece in self.pieces if piece.y_LD is not None]
        seen = Observation(
            number=0,
            phase="generation",
            step=0,
            start=self.pieces[0].start,
            h_LD=torch.cat([piece.h_LD for piece in self.pieces]),
            y_LD=torch.cat(answers) if len(answers) == len(self.pieces) else None,
        )
        return seen, [digest for piece in self.pieces for digest in piece.digests]


class SessionRows:
    """All rows of all sessions of a recording."""

    def __init__(self) -> None:
        self._open: dict[RowName, _Row] = {}
        self._done: list[tuple[Observation, list[bytes]]] = []

    def add(
        self,
        name: RowName,
        position: int,
        h_LD: Tensor,
        y_LD: Tensor | None,
        digests: Sequence[bytes],
    ) -> None:
        """What a call sent of one row.

        Args:
            name: session and row.
            position: of the first vector; smaller than the row's length cuts it back.
            h_LD: what left.
            y_LD: what came back; None where the call failed.
            digests: `vector_digests` of what left.
        """
        row = self._open.setdefault(name, _Row())
        if position < row.end:
            if not row.drops_guesses(position):
                self._done.append(row.observation())
            row.cut_to(position)
        if position > row.end and row.pieces:
            # The middle is missing, as in a recording that began late: two rows.
            self._done.append(row.observation())
            row.pieces = []
        row.pieces.append(_Piece(start=position, h_LD=h_LD, y_LD=y_LD, digests=digests))

    def close(self, session_id: str, rows: Sequence[int]) -> None:
        """Rows are closed, or all of a session where none are named."""
        for name in list(self._open):
            if name[0] == session_id and (not rows or name[1] in rows):
                self._done.append(self._open.pop(name).observation())

    def finish(self) -> list[tuple[Observation, list[bytes]]]:
        """Each row once: what was sent again is part of the longest row that has it."""
        for name in list(self._open):
            self._done.append(self._open.pop(name).observation())
        chains = [list(vector_chain(digests, seen.start)) for seen, digests in self._done]
        inner = {link for chain in chains for link in chain[:-1]}
        ends: set[str] = set()
        kept = []
        for pair, chain in zip(self._done, chains, strict=True):
            if chain[-1] not in inner and chain[-1] not in ends:
                ends.add(chain[-1])
                kept.append(pair)
        return kept
