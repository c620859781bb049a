"""Rows of finished streams that stay cached, so that what begins alike is not sent again.

It does not decode. A kept row is taken over, not copied: its caches go on from the common prefix.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cutlayer.client.session import GenerationSession

__all__ = ["KeptRows"]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    row: int
    tokens: Sequence[int]
    until_s: float


class KeptRows:
    """The most recently finished rows, the oldest goes first."""

    def __init__(
        self,
        session: GenerationSession,
        max_rows: int,
        keep_s: float,
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            session: whose rows they are.
            max_rows: how many at most.
            keep_s: how long at most.
            clock: seconds.
        """
        self._session = session
        self._max_rows = max_rows
        self._keep_s = keep_s
        self._clock = clock
        self._rows: list[_Kept] = []

    def keep(self, row: int, tokens: Sequence[int]) -> None:
        """Keep a row whose cached tokens are the first of these; else close it."""
        length = min(self._session.length(row), len(tokens))
        self._session.truncate(row, length)
        if not length or not self._max_rows:
            self._session.close_row(row)
            return
        until_s = self._clock() + self._keep_s
        self._rows.append(_Kept(row=row, tokens=list(tokens[:length]), until_s=until_s))
        while len(self._rows) > self._max_rows:
            self._session.close_row(self._rows.pop(0).row)

    def take(self, prompt: Sequence[int]) -> tuple[int | None, int]:
        """The row that begins most like the prompt, cut back to what is common, and how much.

        At least the prompt's last token is to be fed again: its logits are not kept.
        """
        lengths = [_num_common(kept.tokens, prompt[:-1]) for kept in self._rows]
        if not any(lengths):
            return None, 0
        best = lengths.index(max(lengths))
        row = self._rows.pop(best).row
        self._session.truncate(row, lengths[best])
        self._session.begin_conversation(row)
        return row, lengths[best]

    def expire(self) -> None:
        """Close the rows whose time is up."""
        now_s = self._clock()
        for kept in [kept for kept in self._rows if kept.until_s <= now_s]:
            self._rows.remove(kept)
            self._session.close_row(kept.row)


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
