"""CoQA: questions about a story, each to be read with the ones before it.

It asks every turn with the whole history of earlier questions and their right answers, as the
published numbers do; it makes no prompt (`templates`) and computes no score (`scores`).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.original_files import file_of, json_file, records_of, texts_of
from cutlayer.evaluation.published.question import (
    TASKS,
    HubName,
    Prediction,
    Question,
    Scored,
    Split,
)
from cutlayer.evaluation.published.scores import score_coqa

__all__ = ["Coqa"]

_FILES = {
    Split.TRAIN: ("coqa-train-v1.0.json",),
    Split.VALIDATION: ("coqa-dev-v1.0.json",),
    Split.TEST: ("coqa-test-v1.0.json", "coqa.test.json"),
}


@TASKS.register("coqa")
class Coqa:
    """Free-form answers over a conversation.

    `Question.fields`: story, question and history (lines `Q: ...` and `A: ...` in turn, empty at
    first). `Question.answers`: those of all human annotators, the main one first; the official
    score leaves one out at a time, so that equal ones stay. The hub has the main one
    alone. A turn without any answer can be neither learnt nor scored: it is not asked, but stays in
    the history.

    Source: Reddy et al., CoQA (arXiv 1808.07042); the files of its release 1.0.
    """

    about = "short free-form answers to questions about a story, one after the other"
    main_metric = "f1"
    max_new_tokens = 32
    hub: HubName | None = HubName(repository="stanfordnlp/coqa")

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Every turn of the split's file; keys are story and turn."""
        path = file_of(folder, _FILES[split])
        whole = json_file(path)
        if not isinstance(whole, dict):
            raise DataError(
                f"{path} holds no JSON object, so it is no file of CoQA; fetch it again"
            )
        stories = records_of(Record(whole, str(path)).value("data"), f"{path}: data")
        return _unique(path, (asked for story in stories for asked in _original_turns(story)))

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Every turn; the hub's columns have no story id, so keys are split, number and turn."""
        return [
            asked
            for number, record in enumerate(records, start=1)
            for asked in _hub_turns(record, f"{split.value}-{number}")
        ]

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """F1 and exact match of the official script."""
        return score_coqa(questions, predictions)


def _original_turns(story: Record) -> Iterator[Question]:
    questions = _texts(story, "questions")
    main = _texts(story, "answers")
    every = [main, *_additional_answers(story)]
    for answers in every:
        _check_numbers(story, questions, answers)
    return _turns(story, story.text("id"), questions, every)


def _hub_turns(record: Record, story_id: str) -> Iterator[Question]:
    questions = texts_of(record.value("questions"), f"{record.where}: questions")
    answers = _hub_answers(record)
    _check_numbers(record, questions, answers)
    return _turns(record, story_id, questions, [answers])


def _turns(
    story: Record, story_id: str, questions: Sequence[str], every: Sequence[Sequence[str]]
) -> Iterator[Question]:
    """Questions of one story.

    Args:
        story: has the columns story and source.
        story_id: unique in the split.
        questions: one for each turn.
        every: answers to all questions, by annotator, the main one first.
    """
    text, source = story.text("story"), story.text("source")
    history: list[str] = []
    for turn, question in enumerate(questions):
        given = tuple(answers[turn] for answers in every)
        if any(answer.strip() for answer in given):
            yield Question(
                key=f"{story_id}/{turn + 1}",
                group=story_id,
                fields={"story": text, "history": "\n".join(history), "question": question},
                answers=given,
                label=source,
            )
        history += [f"Q: {_one_line(question)}", f"A: {_one_line(given[0])}"]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _texts(story: Record, column: str) -> list[str]:
    """Texts of the turns, which the file also numbers: a hole would shift all later answers."""
    turns = records_of(story.value(column), f"{story.where}.{column}")
    for number, turn in enumerate(turns, start=1):
        if turn.value("turn_id") != number:
            raise DataError(f"{turn.where}: turn_id is not {number}; fetch the file again")
    return [turn.text("input_text") for turn in turns]


def _additional_answers(story: Record) -> list[list[str]]:
    """Answers of further annotators, who exist only outside the training file."""
    value = story.fields.get("additional_answers", {})
    where = f"{story.where}.additional_answers"
    if not isinstance(value, dict):
        raise DataError(f"{where} is no object; fetch the file again")
    annotators = Record(value, where)
    return [_texts(annotators, name) for name in value]


def _hub_answers(record: Record) -> list[str]:
    """The hub has one object of lists; the same written as JSON is often a list of objects."""
    value, where = record.value("answers"), f"{record.where}: answers"
    if isinstance(value, dict):
        return texts_of(Record(value, where).value("input_text"), f"{where}.input_text")
    return [turn.text("input_text") for turn in records_of(value, where)]


def _check_numbers(story: Record, questions: Sequence[str], answers: Sequence[str]) -> None:
    if not questions or len(questions) != len(answers):
        raise DataError(
            f"{story.where}: {len(questions)} questions and {len(answers)} answers; "
            "each question needs one, fetch the file again"
        )


def _unique(path: Path, questions: Iterable[Question]) -> list[Question]:
    by_key: dict[str, Question] = {}
    for question in questions:
        if question.key in by_key:
            raise DataError(f"{path}: story and turn {question.key!r} appear twice; remove one")
        by_key[question.key] = question
    return list(by_key.values())
