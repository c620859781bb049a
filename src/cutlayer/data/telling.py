"""Which private tokens of a row may leave where the others stay: the few that tell the answer.

It releases nothing (`privacy.boundary`). What tells is learnt from the owner's own training rows
and never leaves; tokens that few rows have are never chosen, so that names and numbers stay.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from cutlayer.data.template import NOT_SCORED, Example
from cutlayer.errors import ConfigError

__all__ = ["RULE", "mark_withheld", "tell"]

RULE = "specific-surprise"
"""Name of the way in which tokens are chosen: what was measured of another says nothing of this."""

_MIN_ROWS = 5
"""A token that fewer training rows have is never chosen."""
_MAX_ANSWERS = 64

Answer = tuple[int, ...]


def mark_withheld(
    train: Sequence[Example], validation: Sequence[Example], keep_share: float
) -> tuple[list[Example], list[Example]]:
    """The same rows, each told which of its tokens stay.

    Args:
        train: rows that say what tells.
        validation: rows that are marked by the same table.
        keep_share: private tokens of a row that leave all the same, 0 to 1; rounded down.

    Raises:
        ConfigError: the rows have too many different completions to tell apart.
    """
    bits = tell(train) if keep_share else {}
    return (
        [_marked(row, bits, keep_share) for row in train],
        [_marked(row, bits, keep_share) for row in validation],
    )


def tell(rows: Sequence[Example]) -> dict[int, float]:
    """What the presence of a token tells about the completion, in bits of surprise.

    With A = the completion, over the rows that have the token t:
    i(t) = sum over a of P(a | t) log2(P(a | t) / P(a)), and `_MIN_ROWS` rows more with average
    completions, so that few rows do not pass for certainty. Mutual information weighs a token by
    how many rows have it; here the row that has it is given.

    Raises:
        ConfigError: more different completions than a table is of use for.

    Source: DeWeese and Meister, How to measure the information gained from one symbol (1999),
    the specific surprise.
    """
    answers = Counter(_answer(row) for row in rows)
    if len(answers) > _MAX_ANSWERS:
        raise ConfigError(
            f"privacy.keep_share needs rows whose completions repeat: these have {len(answers)} "
            f"different ones, at most {_MAX_ANSWERS} are told apart; set privacy.keep_share = 0"
        )
    with_token: Counter[int] = Counter()
    together: Counter[tuple[int, Answer]] = Counter()
    for row in rows:
        for token in {row.tokens[place] for place in _choosable(row)}:
            with_token[token] += 1
            together[token, _answer(row)] += 1
    shares = {answer: number / len(rows) for answer, number in answers.items()}
    return {
        token: _bits(number, [(together[token, a], share) for a, share in shares.items()])
        for token, number in with_token.items()
        if number >= _MIN_ROWS
    }


def _bits(num_with: int, answers: Iterable[tuple[int, float]]) -> float:
    """Specific surprise; per answer how many rows have it and the token, and its share of all."""
    bits = 0.0
    for num_both, share in answers:
        given = (num_both + _MIN_ROWS * share) / (num_with + _MIN_ROWS)
        bits += given * math.log2(given / share)
    return bits


def _marked(row: Example, bits: Mapping[int, float], keep_share: float) -> Example:
    choosable = _choosable(row)
    ranked = sorted(choosable, key=lambda place: -bits.get(row.tokens[place], -1.0))
    first: dict[int, int] = {}
    for place in ranked:
        if row.tokens[place] in bits:
            first.setdefault(row.tokens[place], place)
    kept = set(list(first.values())[: int(keep_share * len(choosable))])
    private = row.is_private or [True] * len(row.tokens)
    withheld = [flag and place not in kept for place, flag in enumerate(private)]
    return dataclasses.replace(row, is_withheld=withheld)


def _choosable(row: Example) -> list[int]:
    """Places of private tokens that are not the answer."""
    private = row.is_private or [True] * len(row.tokens)
    return [
        place
        for place, (flag, label) in enumerate(zip(private, row.labels, strict=True))
        if flag and label == NOT_SCORED
    ]


def _answer(row: Example) -> Answer:
    return tuple(label for label in row.labels if label != NOT_SCORED)
