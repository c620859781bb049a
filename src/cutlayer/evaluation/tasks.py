"""A task file: one JSON object a line, each one item to score. docs/evaluate.md has the fields.

It does not know tokens or models. Errors name file and line and never show an item's text.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeGuard

from cutlayer.data.sources import Record, read_records
from cutlayer.errors import DataError
from cutlayer.evaluation.text_metrics import METRICS

__all__ = ["ChoiceItem", "GenerateItem", "Item", "Prompt", "read_items"]

_DEFAULT_METRICS = ("exact_match", "f1")
_DEFAULT_NEW_TOKENS = 64
_ROLES = ("assistant", "system", "user")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What stands before the answer: a text, or the turns of a conversation."""

    text: str | None = field(default=None, repr=False)
    messages: tuple[dict[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class ChoiceItem:
    """Which of some texts is likeliest after a prompt."""

    where: str
    """`file:line`."""
    prompt: Prompt = field(repr=False)
    choices: tuple[str, ...] = field(repr=False)
    answer: int
    """Place of the right choice."""


@dataclass(frozen=True, kw_only=True)
class GenerateItem:
    """What the model writes after a prompt, against the right answers."""

    where: str
    """`file:line`."""
    prompt: Prompt = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)
    metrics: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = field(repr=False)
    """Texts that end a reply; they are not part of it."""


Item = ChoiceItem | GenerateItem


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The items of a task file.

    Args:
        path: JSON lines, UTF-8; empty lines are passed over.
        limit: read no more than so many items from the beginning; None reads all.

    Raises:
        DataError: the file is missing, empty or malformed; the message names the line.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a task file (JSON lines)")
    return [_item(record) for record in islice(read_records(path, "jsonl"), limit)]


def _item(record: Record) -> Item:
    kind = record.value("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _unknown(record, "kind", kind, _KINDS)
    return _KINDS[kind](record)


def _choice(record: Record) -> ChoiceItem:
    _require_known(record, {"kind", "context", "messages", "choices", "answer"})
    choices = _texts(record, "choices")
    if len(choices) < 2:
        raise DataError(f"{record.where}: {len(choices)} choices; give two or more")
    if len(set(choices)) < len(choices):
        raise DataError(f"{record.where}: two choices are the same text; remove one")
    answer = record.value("answer")
    if not _is_integer(answer) or not 0 <= answer < len(choices):
        shown = answer if _is_integer(answer) else f"of type {type(answer).__name__}"
        raise DataError(
            f"{record.where}: answer {shown} is not the place of one of {len(choices)} choices; "
            f"use an integer from 0 to {len(choices) - 1}"
        )
    prompt = _prompt(record, "context")
    return ChoiceItem(where=record.where, prompt=prompt, choices=choices, answer=answer)


def _generate(record: Record) -> GenerateItem:
    known = {"kind", "prompt", "messages", "answers", "metrics", "max_new_tokens", "stop"}
    _require_known(record, known)
    metrics = _texts(record, "metrics") if "metrics" in record.fields else _DEFAULT_METRICS
    for name in metrics:
        try:
            METRICS.require(name)
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error
    return GenerateItem(
        where=record.where,
        prompt=_prompt(record, "prompt"),
        answers=_texts(record, "answers", may_be_blank=True),
        metrics=tuple(dict.fromkeys(metrics)),
        max_new_tokens=_num_new_tokens(record),
        stop=_texts(record, "stop") if record.fields.get("stop") else (),
    )


_KINDS: dict[str, Callable[[Record], Item]] = {"choice": _choice, "generate": _generate}


def _prompt(record: Record, name: str) -> Prompt:
    if ("messages" in record.fields) == (name in record.fields):
        raise DataError(f"{record.where}: give {name!r} or 'messages', one of the two")
    if "messages" in record.fields:
        return Prompt(messages=_messages(record))
    text = record.text(name)
    if not text:
        raise DataError(f"{record.where}: {name!r} is empty; give at least one character")
    return Prompt(text=text)


def _messages(record: Record) -> tuple[dict[str, str], ...]:
    value = record.value("messages")
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: 'messages' is not a list of at least one message")
    for number, message in enumerate(value, 1):
        _check_message(record, number, message)
    return tuple(value)


def _check_message(record: Record, number: int, message: object) -> None:
    where = f"{record.where}: message {number}"
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        raise DataError(f"{where} is not an object of 'role' and 'content'")
    if message["role"] not in _ROLES:
        raise DataError(f"{where} has an unknown role; use one of {', '.join(_ROLES)}")
    if not isinstance(message["content"], str):
        raise DataError(f"{where} has a content that is not text")
    record.check_unicode(message["content"], "messages")


def _texts(record: Record, name: str, may_be_blank: bool = False) -> tuple[str, ...]:
    value = record.value(name)
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: {name!r} is not a list of at least one text")
    for number, text in enumerate(value, 1):
        if not isinstance(text, str) or not (text or may_be_blank):
            raise DataError(f"{record.where}: entry {number} of {name!r} is empty or not text")
        record.check_unicode(text, name)
    return tuple(value)


def _num_new_tokens(record: Record) -> int:
    value = record.fields.get("max_new_tokens", _DEFAULT_NEW_TOKENS)
    if not _is_integer(value) or value < 1:
        raise DataError(f"{record.where}: 'max_new_tokens' is not an integer above 0")
    return value


def _is_integer(value: object) -> TypeGuard[int]:
    # JSON's true is a Python int.
    return isinstance(value, int) and not isinstance(value, bool)


def _require_known(record: Record, known: Iterable[str]) -> None:
    for name in record.fields:
        if name not in known:
            raise _unknown(record, "field", name, known)


def _unknown(record: Record, what: str, found: object, known: Iterable[str]) -> DataError:
    names: Sequence[str] = sorted(known)
    near = difflib.get_close_matches(str(found), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return DataError(
        f"{record.where}: {what} {str(found)!r:.40} is unknown; {hint}known: {', '.join(names)}"
    )
