"""What was hidden behind observations; only the owner has it, and only scoring needs it.

It reads no files (`client.truth_file`), and no attack may see it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

from cutlayer.audit.observations import Recorded
from cutlayer.client.truth_file import TruthLine, vector_chain
from cutlayer.errors import DataError
from cutlayer.model.loss import NOT_SCORED

__all__ = ["Hidden", "hidden_rounds", "hidden_rows"]


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """One observation's row, or under Aim.BAG everything that took part in one round."""

    tokens: tuple[int, ...] = field(repr=False)
    """One per vector of the observation."""
    labels: tuple[int, ...] = field(default=(), repr=False)
    """As labels are aligned, -100 where not scored; empty: nothing is."""
    private: tuple[bool, ...] = field(default=(), repr=False)
    """Whether each token is text of the record, not the template's own; empty: all are."""
    stays: tuple[bool, ...] = field(default=(), repr=False)
    """Whether each token's vector was withheld: the observation then has none for it, until
    `places` lays it out; empty: none was."""
    row_id: str = ""
    """Name of the row in its run: a private token counts once, however often the row left.
    Empty: this observation is a row by itself."""

    def private_places(self) -> list[int]:
        """Places of private tokens."""
        flags = self.private or (True,) * len(self.tokens)
        return [place for place, flag in enumerate(flags) if flag]

    def label_places(self) -> list[int]:
        """Places of private tokens that are scored; a row's first has no predictor."""
        if not self.labels:
            return []
        return [p for p in self.private_places() if p and self.labels[p] != NOT_SCORED]


def hidden_rows(recorded: Recorded, lines: Iterable[TruthLine]) -> dict[int, Hidden]:
    """The truth of each observation, by its number; one of which nothing is known is left out.

    Raises:
        DataError: nothing is known of any of them: the truth is of another run.
    """
    finder, found = _Finder(lines), {}
    for seen, digests in zip(recorded.evidence.observations, recorded.digests, strict=True):
        pieces = finder.pieces(digests, seen.start)
        if pieces is not None:
            found[seen.number] = _joined(pieces)
    if recorded.digests and not found:
        raise DataError(
            "the truth knows nothing of what the recording holds; give the one that was written "
            "beside it (its name with .truth)"
        )
    return found


def hidden_rounds(recorded: Recorded, rows: dict[int, Hidden]) -> dict[int, Hidden]:
    """Everything that took part in each round of a plain update, by round."""
    rounds = {}
    for number, members in recorded.rounds.items():
        known = [rows[member] for member in members if member in rows]
        tokens = tuple(token for hidden in known for token in hidden.tokens)
        places = [hidden.private or (True,) * len(hidden.tokens) for hidden in known]
        private = tuple(flag for flags in places for flag in flags)
        rounds[number] = Hidden(tokens=tokens, private=private)
    return rounds


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The first tokens of a line."""

    line: TruthLine
    length: int

    @property
    def num_tokens(self) -> int:
        """Of the line; where vectors stayed it is one row whole."""
        return len(self.line.tokens) if self.line.stays else self.length

    def private(self) -> Sequence[bool]:
        """Of those tokens."""
        return (self.line.private or [True] * len(self.line.tokens))[: self.num_tokens]


class _Finder:
    """Lines by the chain of what left."""

    def __init__(self, lines: Iterable[TruthLine]) -> None:
        self._by_link: dict[str, list[TruthLine]] = defaultdict(list)
        self._num_uses: Counter[int] = Counter()
        for line in lines:
            for link in line.chain:
                self._by_link[link].append(line)

    def pieces(self, digests: Sequence[bytes], start: int) -> list[_Piece] | None:
        """Lines that make up a row, in order; None where one is missing."""
        pieces, place = [], 0
        while place < len(digests):
            links = vector_chain(islice(digests, place, None), start + place)
            known = list(takewhile(self._by_link.__contains__, links))
            if not known:
                return None
            pieces.append(_Piece(line=self._least_used(known[-1]), length=len(known)))
            place += len(known)
        return pieces

    def _least_used(self, link: str) -> TruthLine:
        """Rows whose vectors were all withheld are alike: each is taken once, in order."""
        line = min(self._by_link[link], key=lambda line: self._num_uses[id(line)])
        self._num_uses[id(line)] += 1
        return line


def _joined(pieces: Sequence[_Piece]) -> Hidden:
    first = pieces[0]
    is_row = len(pieces) == 1 and bool(first.line.row)
    return Hidden(
        tokens=tuple(token for piece in pieces for token in piece.line.tokens[: piece.num_tokens]),
        labels=tuple(first.line.labels[: first.num_tokens]) if is_row else (),
        private=tuple(flag for piece in pieces for flag in piece.private()),
        stays=tuple(first.line.stays) if len(pieces) == 1 else (),
        row_id=first.line.row if is_row else "",
    )
