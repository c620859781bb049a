"""Guesses by lookup: what followed the same tokens earlier in prompt and reply. It has no model.

Source: prompt lookup decoding (Saxena 2023), with the longest match first as in REST (He et al.,
arXiv 2311.08252) and overlapping copies as in LZ77.
"""

from collections.abc import Sequence

from cutlayer.client.draft_protocol import Draft

__all__ = ["LookupDrafter"]

_LONG_GRAM = 4
_MAX_CANDIDATES = 32
"""Earlier places that are compared with the end of the text, latest first."""
_MAX_COMPARED = 32
"""A match is not measured any further; what is this long is trusted."""


class LookupDrafter:
    """An index of the text's n-grams that grows with it; the text is never read again."""

    def __init__(self, min_match: int) -> None:
        """Start with no text.

        Args:
            min_match: tokens before a guess that must have occurred before it in this order.
        """
        self._min_match = min_match
        # A rare long gram has few earlier places, so the longest match is among those compared.
        sizes = {min_match, max(min_match, _LONG_GRAM)}
        self._indices = [_GramIndex(size) for size in sorted(sizes, reverse=True)]
        self._tokens: list[int] = []

    def propose(self, tokens: Sequence[int], num_tokens: int) -> Draft:
        """Copy what followed the longest match; see `Drafter`."""
        self._read(tokens)
        match = self._longest_match()
        if match is None:
            return Draft(())
        return Draft(tuple(_copy(self._tokens, match, num_tokens)))

    def close(self) -> None:
        """Forget the text."""
        self._read(())

    def _read(self, tokens: Sequence[int]) -> None:
        if len(tokens) < len(self._tokens):
            self._tokens.clear()
            for index in self._indices:
                index.clear()
        for position in range(len(self._tokens), len(tokens)):
            self._tokens.append(tokens[position])
            for index in self._indices:
                index.add(self._tokens)

    def _longest_match(self) -> int | None:
        """Where the guess starts in the text, or None."""
        for index in self._indices:
            best, best_length = None, 0
            for end in index.earlier_ends(_MAX_CANDIDATES):
                length = _common_suffix(self._tokens, end)
                if length > best_length:
                    best, best_length = end, length
                if length == _MAX_COMPARED:
                    break
            if best is not None and best_length >= self._min_match:
                return best
        return None


class _GramIndex:
    """Every place where each run of `size` tokens ended, latest first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = []
        """By end: the end before it of the same gram, or 0."""

    def clear(self) -> None:
        """Forget everything."""
        self._latest.clear()
        self._earlier.clear()

    def add(self, tokens: list[int]) -> None:
        """Take in the last token of the text."""
        end, earlier = len(tokens), 0
        if end >= self._size:
            gram = tuple(tokens[-self._size :])
            earlier = self._latest.get(gram, 0)
            self._latest[gram] = end
        self._earlier.append(earlier)

    def earlier_ends(self, limit: int) -> list[int]:
        """Where the text's last gram ended before, latest first; 0 tokens know nothing."""
        ends: list[int] = []
        end = self._earlier[-1] if self._earlier else 0
        while end and len(ends) < limit:
            ends.append(end)
            end = self._earlier[end - 1]
        return ends


def _common_suffix(tokens: list[int], end: int) -> int:
    """Tokens before `end` that equal those before the end of the text."""
    last, length = len(tokens), 0
    while (
        length < min(end, _MAX_COMPARED) and tokens[end - 1 - length] == tokens[last - 1 - length]
    ):
        length += 1
    return length


def _copy(tokens: list[int], start: int, num_tokens: int) -> list[int]:
    copied = tokens[start : start + num_tokens]
    # Where the text ends, the copy goes on with itself: a text that repeats is continued so.
    while len(copied) < num_tokens:
        copied.append(copied[len(copied) - (len(tokens) - start)])
    return copied
