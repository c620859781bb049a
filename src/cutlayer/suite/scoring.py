"""What a method gave becomes a result: the official score and digests. No text is kept."""

import hashlib
import math
from collections.abc import Iterable, Sequence

import msgspec

from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import Prediction, Question
from cutlayer.suite.result import Figures, RunResult

__all__ = ["main_score", "scored"]


def scored(result: RunResult, figures: Figures, questions: Sequence[Question]) -> RunResult:
    """The result with its numbers filled in.

    Args:
        result: of the run, still empty.
        figures: what its method gave; without predictions it has no score (an audit).
        questions: the test questions, in order.

    Raises:
        DataError: not one prediction for each question, or a choice that was not offered.
        ConfigError: a number is not finite: the run diverged.
    """
    _check_finite(figures)
    predictions = figures.predictions
    kept = {
        name: getattr(figures, name) for name in figures.__struct_fields__ if name != "predictions"
    }
    filled = msgspec.structs.replace(result, questions_digest=_keys_digest(questions), **kept)
    if not predictions:
        return filled
    score = published_task(result.spec.task).score(questions, predictions)
    return msgspec.structs.replace(
        filled,
        metrics=dict(score.metrics),
        items={name: tuple(values) for name, values in score.items.items()},
        chosen=_chosen(questions, predictions),
        log_likelihoods=tuple(p.log_likelihoods for p in predictions if p.log_likelihoods),
        reply_digests=_reply_digests(questions, predictions),
        groups=_groups(questions),
    )


def main_score(result: RunResult) -> tuple[str, float] | None:
    """Name and value of the metric by which runs of the task are compared; None without a score."""
    name = published_task(result.spec.task).main_metric
    if name in result.metrics:
        return name, result.metrics[name]
    items = result.items.get(name, ())
    return (name, math.fsum(items) / len(items)) if items else None


def _check_finite(figures: Figures) -> None:
    for step, loss in enumerate(figures.losses, 1):
        if not math.isfinite(loss):
            raise ConfigError(f"the loss of step {step} is {loss}; use a smaller learning rate")
    for number, prediction in enumerate(figures.predictions, 1):
        if not all(map(math.isfinite, prediction.log_likelihoods)):
            raise ConfigError(
                f"a log-likelihood of test question {number} is not finite; "
                "use a smaller learning rate or less noise"
            )


def _chosen(questions: Sequence[Question], predictions: Sequence[Prediction]) -> tuple[int, ...]:
    pairs = zip(questions, predictions, strict=True)
    return tuple(_place(question, answer) for question, answer in pairs if question.choices)


def _place(question: Question, prediction: Prediction) -> int:
    if prediction.text not in question.choices:
        raise DataError(
            f"the prediction for question {question.key} is none of its "
            f"{len(question.choices)} choices; score the task's own file"
        )
    return question.choices.index(prediction.text)


def _reply_digests(
    questions: Sequence[Question], predictions: Sequence[Prediction]
) -> tuple[str, ...]:
    pairs = zip(questions, predictions, strict=True)
    return tuple(_sha256([answer.text]) for question, answer in pairs if not question.choices)


def _groups(questions: Sequence[Question]) -> tuple[int, ...]:
    """Numbers in the order of first appearance; none where no two questions share a group."""
    numbers: dict[tuple[str, str], int] = {}
    # Without a group a question is its own.
    names = [(q.group, "" if q.group else q.key) for q in questions]
    found = tuple(numbers.setdefault(name, len(numbers)) for name in names)
    return found if len(numbers) < len(found) else ()


def _keys_digest(questions: Sequence[Question]) -> str:
    return _sha256(question.key for question in questions)


def _sha256(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
