"""Which of many texts are copies of each other, but for small changes, and a split that knows it.

It reads no file and knows no task.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

from cutlayer.evaluation.published.question import Question, Split

__all__ = ["families", "split_by_text"]

_RUN_WORDS = 8
_COPIED_SHARE = 0.2
_TEST_TENTHS = 4


def families(texts: Sequence[str]) -> list[int]:
    """Per text the place of the first one that it is a near copy of; its own where it is none.

    Two texts belong together where at least a fifth of the eight-word runs of the one with fewer
    of them stand in the other too, whatever their case and spacing, and so do the copies of copies.

    Source: Broder, On the resemblance and containment of documents (1997): containment of shingles.
    """
    runs = [_runs(text) for text in texts]
    parent = list(range(len(texts)))
    for (first, other), num_shared in sorted(_shared(runs).items()):
        if num_shared >= _COPIED_SHARE * min(len(runs[first]), len(runs[other])):
            roots = sorted((_root(parent, first), _root(parent, other)))
            parent[roots[1]] = roots[0]
    return [_root(parent, place) for place in range(len(texts))]


def split_by_text(questions: Iterable[Question], name: str) -> dict[Split, list[Question]]:
    """Questions to learn and to score, so that near copies of a text are on one side.

    Four tenths of the families go to the test side, by the smallest SHA-256 of a family's texts.

    Args:
        questions: in any order, which both sides keep.
        name: of the text in `Question.fields` that tells families.
    """
    asked = list(questions)
    texts = list(dict.fromkeys(question.fields[name] for question in asked))
    digests: dict[int, list[str]] = {}
    family_of_text = dict(zip(texts, families(texts), strict=True))
    for text, family in family_of_text.items():
        digests.setdefault(family, []).append(hashlib.sha256(text.encode()).hexdigest())
    is_test = {
        family: int(min(found), base=16) % 10 < _TEST_TENTHS for family, found in digests.items()
    }
    sides: dict[Split, list[Question]] = {Split.TRAIN: [], Split.TEST: []}
    for question in asked:
        family = family_of_text[question.fields[name]]
        sides[Split.TEST if is_test[family] else Split.TRAIN].append(question)
    return sides


def _runs(text: str) -> set[int]:
    """Hashes of the text's runs of words; a short text is one run."""
    words = text.casefold().split()
    num_runs = max(len(words) - _RUN_WORDS + 1, 1)
    return {hash(tuple(words[start : start + _RUN_WORDS])) for start in range(num_runs)}


def _shared(runs: Sequence[set[int]]) -> Counter[tuple[int, int]]:
    """How many runs two texts share, by their places: of texts that share one, not of all pairs."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, of_text in enumerate(runs):
        for run in of_text:
            places[run].append(place)
    shared: Counter[tuple[int, int]] = Counter()
    for with_run in places.values():
        shared.update(combinations(with_run, 2))
    return shared


def _root(parent: Sequence[int], place: int) -> int:
    while parent[place] != place:
        place = parent[place]
    return place
