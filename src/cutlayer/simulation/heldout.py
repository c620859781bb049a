"""Held-out accuracy and loss over the split model: what before, alone and together are compared by.

It does not train, and it reads its owner's rows alone.

Shapes: B = rows of one call, V = vocabulary.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.client.client import Client
from cutlayer.data.tasks import ChoiceTask, Scoring, accuracy, predict
from cutlayer.data.template import NOT_SCORED, Example
from cutlayer.errors import DataError

__all__ = ["HeldOut", "answers_of", "choice_tasks", "held_out"]

_ROWS_PER_CALL = 12
_MAX_ANSWERS = 32

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Scores on rows that training never sees."""

    accuracy: float
    """Share of rows whose likeliest answer is the right one."""
    loss: float
    """Mean cross entropy of the answer's first token over the whole vocabulary, in nats."""
    num_rows: int


class _Losses:
    """Scores rows, and adds up their losses on the way: the same forward serves both."""

    def __init__(self, client: Client, tasks: Sequence[ChoiceTask]) -> None:
        self._client = client
        self._waiting = Counter((task.prompt, task.choices[task.answer][0]) for task in tasks)
        self._firsts: dict[Tokens, set[int]] = {}
        for prompt, first in self._waiting:
            self._firsts.setdefault(prompt, set()).add(first)
        self.total = 0.0

    def score(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits_BV = self._client.score(prompts)
        for prompt, logits_V in zip(map(tuple, prompts), logits_BV, strict=True):
            # Where an answer is scored token by token, prompts with its beginning come by too.
            for first in self._firsts.pop(prompt, set()):
                loss = functional.cross_entropy(logits_V, torch.tensor(first))
                self.total += float(loss) * self._waiting[prompt, first]
        return logits_BV


def held_out(client: Client, tasks: Sequence[ChoiceTask]) -> HeldOut:
    """Ask every question over the split model, as the client's settings say, noise included."""
    if not tasks:
        raise DataError("no held-out row to score; give the owner more rows")
    losses = _Losses(client, tasks)
    predictions = predict(tasks, losses.score, _scoring(tasks), rows_per_call=_ROWS_PER_CALL)
    return HeldOut(
        accuracy=accuracy(tasks, predictions),
        loss=losses.total / len(tasks),
        num_rows=len(tasks),
    )


def answers_of(examples: Iterable[Example]) -> tuple[Tokens, ...]:
    """The different answers of rows, sorted: the choices that a prediction has.

    Raises:
        DataError: fewer than two, or so many that the rows are no multiple choice.
    """
    answers = sorted({_split(example)[1] for example in examples})
    if not 2 <= len(answers) <= _MAX_ANSWERS:
        raise DataError(
            f"the rows have {len(answers)} different completions; owners are compared by multiple "
            f"choice, which needs 2 to {_MAX_ANSWERS}"
        )
    return tuple(answers)


def choice_tasks(examples: Sequence[Example], answers: tuple[Tokens, ...]) -> list[ChoiceTask]:
    """Rows as questions with these answers.

    Raises:
        DataError: a row's completion is not among them.
    """
    tasks: list[ChoiceTask] = []
    for example in examples:
        prompt, answer = _split(example)
        if answer not in answers:
            raise DataError(f"row {example.row_id} does not end with one of the known answers")
        tasks.append(ChoiceTask(prompt, answers, answers.index(answer)))
    return tasks


def _split(example: Example) -> tuple[Tokens, Tokens]:
    """Prompt and answer of a row; what a chat template writes after the answer belongs to none."""
    scored = [place for place, label in enumerate(example.labels) if label != NOT_SCORED]
    if not scored:
        raise DataError(f"row {example.row_id} has no scored token")
    first, last = scored[0], scored[-1]
    return tuple(example.tokens[:first]), tuple(example.tokens[first : last + 1])


def _scoring(tasks: Sequence[ChoiceTask]) -> Scoring:
    firsts = [choice[0] for choice in tasks[0].choices]
    return Scoring.FIRST_TOKEN if len(set(firsts)) == len(firsts) else Scoring.LIKELIHOOD
