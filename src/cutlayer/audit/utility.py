"""What a model is still good for under a setting: the score beside the attacks.

It runs no attack. Rows go the way of an evaluation in training, gates included, so that a setting
that withholds vectors is scored as it would train; nothing of it is recorded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cutlayer.audit.results import Utility
from cutlayer.data.template import NOT_SCORED, Example

__all__ = ["Question", "measure_utility", "questions"]

_MAX_ANSWERS = 8

Tokens = tuple[int, ...]
Loss = Callable[[Example], float]
"""Mean loss of the scored tokens of one row, in nats."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A held-out row with each answer in turn."""

    rows: tuple[Example, ...]
    """One per answer."""
    right: int
    """Place of the true one."""


def questions(rows: Sequence[Example], answers_from: Sequence[Example]) -> list[Question]:
    """Rows as multiple choice; none where they have too many different answers, or one alone.

    Args:
        rows: to be asked.
        answers_from: rows whose answers are the choices.
    """
    answers = sorted({_split(row)[1] for row in (*answers_from, *rows)})
    if not 2 <= len(answers) <= _MAX_ANSWERS or not all(answers):
        return []
    return [
        Question(
            rows=tuple(_with_answer(row, answer) for answer in answers),
            right=answers.index(_split(row)[1]),
        )
        for row in rows
    ]


def measure_utility(rows: Sequence[Example], asked: Sequence[Question], loss: Loss) -> Utility:
    """Score held-out rows.

    Args:
        rows: held-out rows.
        asked: the same as multiple choice; empty where they are none.
        loss: asks the split model.
    """
    if not rows:
        return Utility()
    if not asked:
        sums = [(loss(row) * _num_scored(row), _num_scored(row)) for row in rows]
        return Utility(perplexity=_perplexity(sums), num_rows=len(rows))
    hits, sums = 0, []
    for question in asked:
        costs = [loss(row) * _num_scored(row) for row in question.rows]
        hits += costs.index(min(costs)) == question.right
        sums.append((costs[question.right], _num_scored(question.rows[question.right])))
    return Utility(accuracy=hits / len(asked), perplexity=_perplexity(sums), num_rows=len(asked))


def _perplexity(sums: Sequence[tuple[float, int]]) -> float:
    mean = sum(total for total, _ in sums) / max(1, sum(num for _, num in sums))
    return math.exp(min(mean, 700.0))


def _num_scored(row: Example) -> int:
    return sum(label != NOT_SCORED for label in row.labels)


def _split(row: Example) -> tuple[Tokens, Tokens]:
    """Prompt and scored tokens."""
    scored = [place for place, label in enumerate(row.labels) if label != NOT_SCORED]
    if not scored:
        return tuple(row.tokens), ()
    return tuple(row.tokens[: scored[0]]), tuple(row.tokens[scored[0] : scored[-1] + 1])


def _with_answer(row: Example, answer: Tokens) -> Example:
    prompt, own = _split(row)
    flags = row.is_private or [True] * len(row.tokens)
    # Who is asked does not know the answer: its tokens are as private as the true one's.
    is_private = any(flags[len(prompt) : len(prompt) + len(own)])
    return Example(
        tokens=[*prompt, *answer],
        labels=[NOT_SCORED] * len(prompt) + list(answer),
        row_id=row.row_id,
        is_private=[*flags[: len(prompt)], *([is_private] * len(answer))],
    )
