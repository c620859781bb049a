"""Scores of a model on held-out rows: multiple choice, loss, perplexity.

It does not run the model: the caller passes a function that does, split or not.

Shapes: B = rows of one call, V = vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

from cutlayer.data.batches import Batch, batch
from cutlayer.data.template import Example
from cutlayer.errors import DataError

__all__ = ["ChoiceTask", "LossReport", "Score", "Scoring", "accuracy", "mean_loss", "predict"]

T = TypeVar("T")

Score = Callable[[Sequence[Sequence[int]]], Tensor]
"""B rows of token ids -> logits_BV at each row's last position."""


class Scoring(StrEnum):
    """How a choice is scored."""

    FIRST_TOKEN = "first-token"
    """Logit of its first token: one forward per row."""
    LIKELIHOOD = "likelihood"
    """Sum of the log-probabilities of all its tokens: one forward per different beginning."""


@dataclass(frozen=True)
class ChoiceTask:
    """One question with a fixed list of answers."""

    prompt: tuple[int, ...] = field(repr=False)
    """Token ids before the answer."""
    choices: tuple[tuple[int, ...], ...] = field(repr=False)
    """Token ids of each answer; at least one token each."""
    answer: int = field(repr=False)
    """Place of the right answer in `choices`."""

    def __post_init__(self) -> None:
        if not self.prompt or len(self.choices) < 2 or not all(self.choices):
            raise DataError("a choice task needs a prompt and two or more answers, none empty")
        if not 0 <= self.answer < len(self.choices):
            raise DataError(f"answer {self.answer} is not one of {len(self.choices)} choices")


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """Mean loss over the scored tokens of a data set."""

    loss: float
    """Nats per scored token."""
    num_tokens: int
    """Scored tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def predict(
    tasks: Sequence[ChoiceTask],
    score: Score,
    scoring: Scoring = Scoring.FIRST_TOKEN,
    rows_per_call: int = 8,
) -> list[int]:
    """The choice with the highest score for every task; the first one of equals.

    Raises:
        DataError: two choices share their first token where only that is scored.
    """
    if scoring is Scoring.FIRST_TOKEN:
        return _predict_first_token(tasks, score, rows_per_call)
    return [_predict_likelihood(task, score, rows_per_call) for task in tasks]


def accuracy(tasks: Sequence[ChoiceTask], predictions: Sequence[int]) -> float:
    """Share of the tasks whose prediction is the answer."""
    if not tasks:
        raise DataError("no task to score; give at least one held-out row")
    hits = (task.answer == choice for task, choice in zip(tasks, predictions, strict=True))
    return sum(hits) / len(tasks)


def mean_loss(
    examples: Sequence[Example],
    loss_sum: Callable[[Batch], float],
    rows_per_call: int = 8,
) -> LossReport:
    """Mean loss over all scored tokens: sums are added first, so that long rows count by tokens.

    Args:
        examples: validation rows.
        loss_sum: summed cross entropy of a batch's scored tokens, in nats.
        rows_per_call: rows packed into one batch.
    """
    if not examples:
        raise DataError("no validation row to score; set data.validation or validation_fraction")
    total, num_tokens = 0.0, 0
    for places in _slices(range(len(examples)), rows_per_call):
        rows = batch(examples, places)
        total += loss_sum(rows)
        num_tokens += rows.num_scored
    return LossReport(loss=total / num_tokens, num_tokens=num_tokens)


def _predict_first_token(
    tasks: Sequence[ChoiceTask], score: Score, rows_per_call: int
) -> list[int]:
    for task in tasks:
        firsts = [choice[0] for choice in task.choices]
        if len(set(firsts)) < len(firsts):
            raise DataError("two choices begin with the same token; score by likelihood instead")
    predictions: list[int] = []
    for start in range(0, len(tasks), rows_per_call):
        some = tasks[start : start + rows_per_call]
        logits_BV = score([task.prompt for task in some])
        for task, logits_V in zip(some, logits_BV, strict=True):
            firsts = [choice[0] for choice in task.choices]
            predictions.append(int(logits_V[firsts].argmax()))
    return predictions


def _predict_likelihood(task: ChoiceTask, score: Score, rows_per_call: int) -> int:
    # Every beginning once: answers that share tokens share the forward.
    beginnings = list(dict.fromkeys(c[:n] for c in task.choices for n in range(len(c))))
    log_probs: dict[tuple[int, ...], Tensor] = {}
    for some in _slices(beginnings, rows_per_call):
        logits_BV = score([task.prompt + beginning for beginning in some])
        log_probs.update(zip(some, torch.log_softmax(logits_BV.float(), dim=-1), strict=True))
    sums = [
        sum(float(log_probs[choice[:n]][token]) for n, token in enumerate(choice))
        for choice in task.choices
    ]
    return sums.index(max(sums))


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
