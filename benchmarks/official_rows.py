"""Larger made-up rows of each task, by a seed, and the fixed rule that spoils right answers.

It scores nothing. The words are our own: inflected, irregular, hyphenated, without a letter, and
articles alone, which is what the official scripts differ in.
"""

import random
from collections.abc import Sequence

from benchmarks.official_examples import CB_CLASSES

__all__ = ["cb_rows", "lead", "multirc_rows", "record_rows", "spoilt", "summary_rows"]

_WORDS = (
    *("the", "a", "an", "The", "river", "rivers", "running", "runs", "baker", "bakers", "baked"),
    *(
        "quickly",
        "happiness",
        "U.S.",
        "4.5",
        "1,200",
        "train-line",
        "O'Hara's",
        "\u2014",
        "caf\u00e9",
    ),
    *("well-known", "council", "councils", "decides", "decided", "deciding", "bread", "kites"),
    *("kite", "7", "x", "isn't"),
)
_IRREGULAR_WORDS = (
    *("children", "child", "better", "good", "women", "woman", "thought", "think", "brought"),
    *("bring", "flies", "flying", "dies", "dying"),
)
"""Those that ROUGE-1.5.5 looks up instead of stemming, and those that NLTK stems otherwise."""


def spoilt(number: int, answer: str, other: str) -> str:
    """A reply made of the right answer by the row's number, so that the file is always the same.

    Args:
        number: of the row; six in turn are: right, every second word left out, another row's
            answer, empty, shouted with an article, and followed by too much.
        answer: the right one.
        other: another row's.
    """
    kinds = (
        answer,
        " ".join(answer.split()[::2]),
        other,
        "",
        f"The {answer.upper()}!",
        f"{answer}, and then {other}",
    )
    return kinds[number % len(kinds)]


def lead(document: str) -> str:
    """The first three sentences, one a line: the baseline of the summaries' papers."""
    return "\n".join(document.replace("\n", " ").split(". ")[:3])


def cb_rows(num_rows: int, seed: int) -> list[tuple[str, str]]:
    """Wanted and said classes, right for about two of three."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        wanted = draw.choice(CB_CLASSES)
        rows.append((wanted, wanted if draw.random() < 0.5 else draw.choice(CB_CLASSES)))
    return rows


def multirc_rows(num_rows: int, seed: int) -> list[tuple[str, str, str]]:
    """Question, wanted and said of options; about three options a question, in mixed order."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        wanted = draw.choice(("yes", "no", "no"))
        said = wanted if draw.random() < 0.8 else draw.choice(("yes", "no"))
        rows.append((f"q{draw.randrange(num_rows // 3 + 1)}", wanted, said))
    return rows


def record_rows(num_rows: int, seed: int) -> list[tuple[tuple[str, ...], str]]:
    """Entities that fill a gap, one to three, and a reply by `spoilt`."""
    draw = random.Random(seed)
    answers = [
        tuple(_text(draw, 1, 4, _WORDS) for _ in range(draw.randint(1, 3))) for _ in range(num_rows)
    ]
    return [
        (these, spoilt(number, these[0], answers[number - 1][0]))
        for number, these in enumerate(answers)
    ]


def summary_rows(num_rows: int, seed: int, has_irregular_words: bool) -> list[tuple[str, str]]:
    """References of one to four lines, and replies of a few of their words and others."""
    draw = random.Random(seed)
    words = _WORDS + _IRREGULAR_WORDS if has_irregular_words else _WORDS
    return [(_lines(draw, words), _lines(draw, words)) for _ in range(num_rows)]


def _lines(draw: random.Random, words: Sequence[str]) -> str:
    return "\n".join(_text(draw, 3, 14, words) for _ in range(draw.randint(1, 4)))


def _text(draw: random.Random, fewest: int, most: int, words: Sequence[str]) -> str:
    return " ".join(draw.choice(words) for _ in range(draw.randint(fewest, most)))
