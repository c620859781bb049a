"""What a model is still good for under a setting: the score beside the attacks.

It runs no attack. Rows go the way of an evaluation in training, gates included, so that a setting
that withholds vectors is scored as it would train; nothing of it is recorded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cutlayer.audit.results import Utility
from cutlayer.data.template import NOT_SCORED, Example

__all__ = ["Question", "are_single_tokens", "measure_choices", "measure_utility", "questions"]

_MAX_ANSWERS = 8
_ROWS_PER_CALL = 6

Tokens = tuple[int, ...]
FirstLogits = Callable[[Sequence[Example]], Tensor]
"""Rows -> logits_BV where each row's first scored token is predicted."""
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


def are_single_tokens(asked: Sequence[Question]) -> bool:
    """Whether every answer of every question is one token: one forward then serves them all."""
    return bool(asked) and all(_num_scored(row) == 1 for one in asked for row in one.rows)


def measure_choices(
    rows: Sequence[Example], asked: Sequence[Question], first_logits: FirstLogits
) -> Utility:
    """Score held-out rows whose answers are single tokens, several rows a call.

    Args:
        rows: held-out rows.
        asked: the same as multiple choice, in the same order.
        first_logits: asks the split model.
    """
    hits, sums = 0, []
    for first in range(0, len(rows), _ROWS_PER_CALL):
        some = slice(first, first + _ROWS_PER_CALL)
        logits_BV = first_logits(rows[some])
        for logits_V, question in zip(logits_BV, asked[some], strict=True):
            answers = [_split(row)[1][0] for row in question.rows]
            hits += int(logits_V[answers].argmax()) == question.right
            sums.append((-float(logits_V.log_softmax(0)[answers[question.right]]), 1))
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
        is_withheld=[*row.is_withheld[: len(prompt)], *([True] * len(answer))]
        if row.is_withheld
        else [],
    )
