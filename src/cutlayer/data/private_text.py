"""Which tokens of a row are somebody's text, and which the template's own words.

It does not make rows (`template`) nor decide what leaves (`privacy.boundary`). In doubt a token is
private: one that a column's text and the template share, or that is cut in another way alone.
"""

import re
from collections.abc import Callable, Iterable, Sequence

__all__ = ["Ranges", "are_private", "filled", "found_in"]

Ranges = tuple[tuple[int, int], ...]
"""Begin and end of each run of private characters."""

Encode = Callable[[str], list[int]]


def filled(parts: Iterable[tuple[str, str]]) -> tuple[str, Ranges]:
    """Template words and the record's text behind each, joined, and where the latter stands."""
    text, ranges = "", []
    for words, own in parts:
        begin = len(text) + len(words)
        text += words + own
        if own:
            ranges.append((begin, len(text)))
    return text, tuple(ranges)


def found_in(text: str, pieces: Iterable[str]) -> Ranges:
    """Everywhere that pieces stand in a text; the whole text where one is not found.

    A template's own words may say the same, and which of them is the record's is not known.
    """
    ranges = set[tuple[int, int]]()
    for piece in filter(None, pieces):
        found = [at.start() for at in re.finditer(f"(?={re.escape(piece)})", text)]
        if not found:
            return ((0, len(text)),)
        ranges.update((begin, begin + len(piece)) for begin in found)
    return tuple(sorted(ranges))


def are_private(ids: Sequence[int], text: str, ranges: Ranges, encode: Encode) -> list[bool]:
    """Per token of a text whether any of its characters is private.

    Args:
        ids: the text's tokens.
        text: what they were made of.
        ranges: its private characters.
        encode: token ids of a text, without special tokens.
    """
    private = [False] * len(ids)
    for begin, end in ranges:
        if begin == end:
            continue
        first = _num_shared(ids, encode(text[:begin]))
        behind = _num_shared(ids[::-1], encode(text[end:])[::-1])
        last = max(len(ids) - behind, min(first + 1, len(ids)))
        private[first:last] = [True] * (last - first)
    return private


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Tokens that both begin with."""
    number = 0
    for one, other in zip(ids, others, strict=False):
        if one != other:
            break
        number += 1
    return number
