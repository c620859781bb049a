"""What `cutlayer eval --out` wrote for a published task, as answers to its questions.

It scores nothing (`scores`) and writes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from cutlayer.data.sources import Record, read_records
from cutlayer.errors import DataError
from cutlayer.evaluation.published.question import Prediction, Question
from cutlayer.evaluation.text_metrics import METRICS

__all__ = ["predictions_of"]

_OTHER_TASK = "these predictions are another task's, or of an earlier test file; predict again"
_TOLERANCE = 1e-6
"""Between two computations of a score."""


def predictions_of(path: Path, questions: Sequence[Question]) -> list[Prediction]:
    """What `cutlayer eval --out` wrote, as answers to the questions.

    Args:
        path: JSON lines, one per item of the task's `test.jsonl`, all of them, in order.
        questions: those items' questions.

    Raises:
        DataError: another number of lines, another order, or lines of another task as far as the
            right answers that they were scored with tell it.
    """
    records = list(read_records(path, "jsonl"))
    if len(records) != len(questions):
        raise DataError(
            f"{path} has {len(records)} predictions for {len(questions)} questions; score the "
            "task's whole test.jsonl: without --limit, and without --skip-long"
        )
    return [
        _prediction(record, question, line)
        for line, (record, question) in enumerate(zip(records, questions, strict=True), 1)
    ]


class _Line(msgspec.Struct, frozen=True):
    """What a line of predictions must have; other keys are for people."""

    where: str
    kind: str
    log_likelihoods: tuple[float, ...] = ()
    choice: int | None = None
    answer: int | None = None
    scores: Mapping[str, float] = {}
    reply: str | None = None


def _prediction(record: Record, question: Question, line: int) -> Prediction:
    found = _of_line(record)
    if not found.where.endswith(f":{line}"):
        raise DataError(
            f"{record.where} is about {found.where}, not about line {line} of the test file; "
            "leave the predictions in the order in which they were written"
        )
    return _choice(record, found, question) if question.choices else _reply(record, found, question)


def _choice(record: Record, found: _Line, question: Question) -> Prediction:
    chosen, num_choices = found.choice, len(question.choices)
    if chosen is None or len(found.log_likelihoods) != num_choices or not 0 <= chosen < num_choices:
        raise DataError(
            f"{record.where}: {len(found.log_likelihoods)} log-likelihoods for {num_choices} "
            f"choices; {_OTHER_TASK}"
        )
    right = found.answer
    if right is not None and question.choices[right : right + 1] != question.answers[:1]:
        raise DataError(f"{record.where}: its right choice is not the question's; {_OTHER_TASK}")
    return Prediction(text=question.choices[chosen], log_likelihoods=found.log_likelihoods)


def _reply(record: Record, found: _Line, question: Question) -> Prediction:
    if found.reply is None:
        raise DataError(f"{record.where}: no reply, but the task asks for one; {_OTHER_TASK}")
    # Questions without answers are refused where they are scored.
    for name in found.scores.keys() & set(METRICS.names) if question.answers else ():
        score = METRICS.make(name)(found.reply, question.answers)
        if not math.isclose(score, found.scores[name], abs_tol=_TOLERANCE):
            raise DataError(
                f"{record.where}: against the question's answers the reply has another {name}; "
                f"{_OTHER_TASK}"
            )
    return Prediction(text=found.reply)


def _of_line(record: Record) -> _Line:
    try:
        return msgspec.convert(record.fields, _Line)
    except msgspec.ValidationError as error:
        raise DataError(f"{record.where} is no line of cutlayer eval --out: {error}") from error
