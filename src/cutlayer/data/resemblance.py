"""Texts that say nearly the same: told by the words that they share.

It keeps no rows apart itself; whoever splits data asks it before a row goes to training.
"""

from collections import defaultdict
from collections.abc import Iterable

__all__ = ["MIN_RESEMBLANCE", "Resembling", "words_of"]

MIN_RESEMBLANCE = 0.6
"""Share of common words, of all words of both, from which two texts count as one."""


def words_of(text: str) -> frozenset[str]:
    """The different words of a text, without case, marks and order."""
    letters = "".join(c if c.isalnum() else " " for c in text.casefold())
    return frozenset(letters.split())


class Resembling:
    """Texts, and whether another one says nearly the same; one without words resembles none."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._words = [words_of(text) for text in texts]
        self._places: defaultdict[str, list[int]] = defaultdict(list)
        """Texts with a word, by their number."""
        for place, words in enumerate(self._words):
            for word in words:
                self._places[word].append(place)

    def __contains__(self, text: str) -> bool:
        words = words_of(text)
        candidates = {place for word in self._telling(words) for place in self._places[word]}
        return any(_share(words, self._words[place]) for place in candidates)

    def _telling(self, words: frozenset[str]) -> list[str]:
        """So many of the rarest words that a text without them all cannot resemble."""
        known = sorted(words, key=lambda word: len(self._places.get(word, ())))
        num_foreign = len(words) - int(MIN_RESEMBLANCE * len(words))
        return [word for word in known[: num_foreign + 1] if word in self._places]


def _share(words: frozenset[str], other: frozenset[str]) -> bool:
    return len(words & other) >= MIN_RESEMBLANCE * len(words | other)
