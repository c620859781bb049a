"""The files of the asset `evaluation` as questions of the published tasks that they belong to.

It splits nothing (`near_copies`) and fetches nothing. Every question of a file is read; what does
not parse is an error, but for articles that appear twice, of which one is kept.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.near_copies import families
from cutlayer.evaluation.published.original_files import (
    json_file,
    records_of,
    text_file,
    texts_of,
)
from cutlayer.evaluation.published.question import Question, Split

__all__ = ["cnn_dailymail", "coqa", "multirc", "xsum"]

_SENTENCE = re.compile(r"Sent \d+: ")
_MULTIRC = re.compile(r"Paragraph- (?P<paragraph>.*?)\s*\nQuestion: (?P<rest>.*)", re.DOTALL)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def coqa(root: Path) -> list[Question]:
    """Every turn of the official test stories."""
    folder = root / "coqa_conversational_question_answering"
    return published_task("coqa").read_original(folder, Split.TEST)


def xsum(root: Path) -> list[Question]:
    """Articles of the test split, from two collections of them."""
    gem = _task_file(root / "gem/xsum/task.json")
    rows = [
        {
            "document": record.text("input"),
            "summary": record.text("target"),
            "id": record.text("comment"),
        }
        for record in gem
    ]
    rows += [
        {
            "document": record.text("source"),
            "summary": record.text("true_cnd"),
            "id": record.text("idx"),
        }
        for record in _commented_lines(root / "factuality_of_summary/xsum.json")
    ]
    records = [Record(row, f"{root}: xsum {place}") for place, row in enumerate(rows, 1)]
    return _once(published_task("xsum").read_records(records, Split.TEST))


def cnn_dailymail(root: Path) -> list[Question]:
    """Articles of the test split with their highlights."""
    records = [
        Record(
            {
                "article": record.text("source"),
                "highlights": record.text("true_cnd"),
                "id": record.text("idx"),
            },
            record.where,
        )
        for record in _commented_lines(root / "factuality_of_summary/cnn_dm.json")
    ]
    return _once(published_task("cnn_dailymail").read_records(records, Split.TEST))


def multirc(root: Path) -> list[Question]:
    """Every option of every question; the file has them in one text with their letters."""
    path = root / "natural_instructions/subtask058_multirc_question_answering/task.json"
    records = (option for options in _multirc_options(_task_file(path)) for option in options)
    return published_task("multirc").read_records(records, Split.TEST)


def _task_file(path: Path) -> list[Record]:
    (task,) = records_of([json_file(path)], str(path))
    return records_of(Record(task.fields, str(path)).value("examples"), f"{path}: examples")


def _commented_lines(path: Path) -> Iterator[Record]:
    """JSON lines below two lines of comment."""
    for number, line in enumerate(text_file(path).split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            where = f"{path}:{number}"
            (record,) = records_of([_json(line, where)], where)
            yield Record(record.fields, where)


def _json(line: str, where: str) -> object:
    try:
        value: object = json.loads(line)
    except json.JSONDecodeError as error:
        # Not `error.doc`: the message must not carry the file's text.
        where = f"{where}: malformed JSON: {error.msg}"
        raise DataError(f"{where}; truncated? fetch it again") from None
    except (RecursionError, ValueError) as error:
        where = f"{where}: malformed JSON: nested too deep or number too long"
        raise DataError(f"{where}; fetch it again") from error
    return value


def _once(questions: Sequence[Question]) -> list[Question]:
    """The first of each family of near copies."""
    first = families([question.fields["document"] for question in questions])
    return [question for place, question in enumerate(questions) if first[place] == place]


def _multirc_options(examples: Iterable[Record]) -> Iterator[list[Record]]:
    places: dict[str, int] = {}
    num_asked: dict[str, int] = {}
    for example in examples:
        found = _MULTIRC.fullmatch(example.text("input"))
        if found is None:
            raise DataError(f"{example.where} is no paragraph with a question; fetch it again")
        paragraph = " ".join(part.strip() for part in _SENTENCE.split(found["paragraph"])).strip()
        place = places.setdefault(paragraph, len(places))
        asked = num_asked.get(paragraph, 0)
        num_asked[paragraph] = asked + 1
        question, options = _options(found["rest"], example)
        right = _right(example, len(options))
        yield [
            Record(
                {
                    "paragraph": paragraph,
                    "question": question,
                    "answer": option,
                    "idx": {"paragraph": place, "question": asked, "answer": number},
                    "label": int(_LETTERS[number] in right),
                },
                example.where,
            )
            for number, option in enumerate(options)
        ]


def _options(text: str, example: Record) -> tuple[str, list[str]]:
    """The question and its options, which are marked (A), (B) and so on in this order."""
    parts: list[str] = []
    rest = text
    for letter in _LETTERS:
        before, mark, after = rest.partition(f"({letter}) ")
        if not mark:
            break
        parts.append(before.strip())
        rest = after
    if not parts:
        raise DataError(f"{example.where}: a question without an option; fetch the file again")
    # The full stop ends the list, not the option.
    return parts[0], [*parts[1:], rest.strip().removesuffix(".")]


def _right(example: Record, num_options: int) -> set[str]:
    """Letters such as `A, C.`"""
    texts = texts_of(example.value("target"), example.where)
    if len(texts) != 1:
        raise DataError(f"{example.where}: {len(texts)} targets, not one; fetch the file again")
    letters = set(texts[0].removesuffix(".").split(", "))
    if not letters <= set(_LETTERS[:num_options]):
        raise DataError(f"{example.where}: an answer is no option; fetch the file again")
    return letters
