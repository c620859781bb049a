"""Columns of published files that are no plain text: numbers, labels, records in records.

It opens no file. A `Record` reads its plain text columns itself.
"""

from collections.abc import Callable, Iterable, Sequence

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.original_files import records_of
from cutlayer.evaluation.published.question import Question, Split

__all__ = [
    "NO_YES",
    "inner",
    "inners",
    "integer",
    "named_label",
    "read_distinct",
    "text_question",
    "text_questions",
]

NO_YES = ("no", "yes")
"""The choices of a task whose labels are false and true, in the order of 0 and 1."""

_NO_LABEL = (None, -1)
"""What a hub's column holds where the authors keep the label back."""


def integer(record: Record, name: str) -> int:
    """The whole number in one column.

    Raises:
        DataError: no such column, or no whole number.
    """
    value = record.value(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(
            f"{record.where}: column {name!r} is no whole number; fetch the file again, or write "
            "it with the columns of the original"
        )
    return value


def inner(record: Record, name: str) -> Record:
    """The object in one column, as a record of its own.

    Raises:
        DataError: no such column, or no object.
    """
    (found,) = records_of([record.value(name)], f"{record.where}: {name}")
    return Record(found.fields, f"{record.where}: {name}")


def inners(record: Record, name: str) -> list[Record]:
    """The objects of the list in one column.

    Raises:
        DataError: no such column, no list, or something else than an object in it.
    """
    return records_of(record.value(name), f"{record.where}: {name}")


def named_label(record: Record, names: Sequence[str], split: Split) -> str | None:
    """The label of a record, None where a test split keeps it back.

    Files of SuperGLUE's authors hold a name, or false and true for `NO_YES`; a hub has the number
    of the name.

    Args:
        record: with a column `label`, which a test split may lack.
        names: of the labels, in the order of their numbers.
        split: whose record it is.

    Raises:
        DataError: a label that is none of these, or none outside a test split.
    """
    if split is Split.TEST and record.fields.get("label") in _NO_LABEL:
        return None
    found = _name_of(record.value("label"), names)
    if found is None:
        known = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        raise DataError(
            f"{record.where}: column 'label' holds no label of the task; its numbers are {known}"
        )
    return found


def read_distinct(
    records: Iterable[Record], read: Callable[[Record], Question], what: str
) -> list[Question]:
    """A question per record, whose keys must differ: each ties a prediction to its answer.

    Args:
        records: of one split.
        read: makes one question.
        what: the columns that keys are made of, for the error.

    Raises:
        DataError: two questions have the same key, and what `read` raises.
    """
    by_key: dict[str, Question] = {}
    for record in records:
        question = read(record)
        if question.key in by_key:
            raise DataError(
                f"{record.where}: a second record {question.key}; {what} must differ from those of "
                "all records before"
            )
        by_key[question.key] = question
    return list(by_key.values())


def text_questions(records: Iterable[Record], names: Sequence[str], split: Split) -> list[Question]:
    """A question per record with columns `text` and `label`; keys are the split and a number.

    Args:
        records: of one split.
        names: of the labels, in the order of their numbers.
        split: whose records they are.

    Raises:
        DataError: no text, or a label that is none of these.
    """
    return [
        text_question(
            f"{split.value}/{number}",
            record.text("text"),
            named_label(record, names, split),
            names,
        )
        for number, record in enumerate(records, start=1)
    ]


def text_question(key: str, text: str, label: str | None, names: Sequence[str]) -> Question:
    """Which of some labels a text has; `label` is None where the authors keep it back."""
    return Question(
        key=key,
        fields={"text": text},
        choices=tuple(names),
        answers=() if label is None else (label,),
        label=label or "",
    )


def _name_of(value: object, names: Sequence[str]) -> str | None:
    if isinstance(value, bool):
        return NO_YES[value] if tuple(names) == NO_YES else None
    if isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value if isinstance(value, str) and value in names else None
