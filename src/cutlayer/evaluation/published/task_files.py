"""A published task as files that `cutlayer train` and `cutlayer eval` take.

`train.jsonl` has rows to learn, `test.jsonl` items to score (docs/evaluate.md), `keys.jsonl` what
the official score needs of each item, `task.json` where all that came from. It chooses and scores
no questions and reads no `predictions`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cutlayer.data.settings import DataSettings, OnTooLong
from cutlayer.data.sources import Record, read_records
from cutlayer.errors import DataError
from cutlayer.evaluation.published.question import TASKS, PublishedTask, Question
from cutlayer.evaluation.published.templates import Form, Template, template_of
from cutlayer.evaluation.text_metrics import METRICS
from cutlayer.storage.files import explain_os_errors, write_atomic

__all__ = ["Provenance", "TaskAbout", "TaskFolder", "open_task", "write_task"]

_TRAIN, _TEST, _KEYS, _ABOUT = "train.jsonl", "test.jsonl", "keys.jsonl", "task.json"


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where questions came from and how they were chosen."""

    source: str
    """packaged, hub, or the folder with the original files."""
    is_demo_scale: bool
    """A split of ours: no number made with it compares with a published table."""
    seed: int = 0
    """Of the training rows."""


class TaskAbout(Provenance, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `task.json` says."""

    task: str
    """Name of the published task."""
    form: Form
    num_train: int
    num_test: int
    has_choices: bool
    """Choices are scored; otherwise replies are written."""


class _Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of `keys.jsonl`."""

    key: str
    group: str
    choices: tuple[str, ...]
    answers: tuple[str, ...]
    label: str


@dataclass(frozen=True, kw_only=True)
class TaskFolder:
    """A folder that `write_task` wrote."""

    folder: Path
    about: TaskAbout

    @property
    def train(self) -> Path:
        """Rows to learn: `prompt`, `completion`, `label`, or `messages`, `label`."""
        return self.folder / _TRAIN

    @property
    def test(self) -> Path:
        """Items to score."""
        return self.folder / _TEST

    @property
    def keys(self) -> Path:
        """One line per item of `test`: what ties it to the official score."""
        return self.folder / _KEYS

    def data_settings(self, max_length: int | None = None) -> DataSettings:
        """Settings that read the training rows: loss on the answer alone.

        Args:
            max_length: tokens of a row; longer prompts lose their beginning. None: the model's
                context.
        """
        is_chat = self.about.form is Form.CHAT
        return DataSettings(
            train=self.train,
            prompt=None if is_chat else "prompt",
            completion=None if is_chat else "completion",
            messages="messages" if is_chat else None,
            chat_template=is_chat,
            # A choice is scored without its end; a reply has to learn where to stop.
            append_eos=not self.about.has_choices,
            max_length=max_length,
            on_too_long=OnTooLong.TRUNCATE_PROMPT,
        )

    def questions(self) -> list[Question]:
        """The test questions, in order, without the texts that templates are made of.

        Raises:
            DataError: `keys.jsonl` is missing, malformed or of another length.
        """
        questions = [
            Question(**msgspec.structs.asdict(_key_of(record)))
            for record in read_records(self.keys, "jsonl")
        ]
        if len(questions) != self.about.num_test:
            raise DataError(
                f"{self.keys} has {len(questions)} lines, {_ABOUT} says {self.about.num_test}; "
                "write the task again"
            )
        return questions


def write_task(
    name: str,
    train: Sequence[Question],
    test: Sequence[Question],
    folder: Path,
    form: Form,
    about: Provenance,
    template: Template | None = None,
) -> TaskFolder:
    """Write the files of a task.

    Args:
        name: of the published task.
        train: questions to learn; may be empty where a model is only scored.
        test: questions to score, in this order.
        folder: made if need be; the four files in it are replaced.
        form: how the model is spoken to.
        about: where the questions came from.
        template: the words around them; None takes the task's own.

    Raises:
        ConfigError: no such task.
        DataError: nothing to score, a question without an answer or without a text of the template,
            or choices that the template spells alike.
        StorageError: the folder cannot be made or written.
    """
    task = TASKS.get(name)
    words = template_of(name) if template is None else template
    _check(name, train, test)
    _check_words(name, words, test)
    said = TaskAbout(
        **msgspec.structs.asdict(about),
        task=name,
        form=form,
        num_train=len(train),
        num_test=len(test),
        has_choices=bool(test[0].choices),
    )
    rows = [_row(question, words, form) for question in train]
    items = [_item(question, words, form, task) for question in test]
    with explain_os_errors(f"create folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        # First gone and last written: a folder without it is no task, so a crash leaves no mixture.
        (folder / _ABOUT).unlink(missing_ok=True)
    write_atomic(folder / _TRAIN, _lines(rows))
    write_atomic(folder / _TEST, _lines(items))
    write_atomic(folder / _KEYS, _lines(map(_key, test)))
    write_atomic(folder / _ABOUT, msgspec.json.format(msgspec.json.encode(said)) + b"\n")
    return TaskFolder(folder=folder, about=said)


def open_task(folder: Path) -> TaskFolder:
    """A folder that `write_task` wrote.

    Raises:
        DataError: it is none, or its `task.json` is damaged.
    """
    file = folder / _ABOUT
    missing = [name for name in (_ABOUT, _TRAIN, _TEST, _KEYS) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} is no task folder, it lacks {', '.join(missing)}; "
            f"write one with cutlayer eval task NAME --out {folder}"
        )
    with explain_os_errors(f"read {file}"):
        raw = file.read_bytes()
    try:
        return TaskFolder(folder=folder, about=msgspec.json.decode(raw, type=TaskAbout))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is damaged: {error}; write the task again") from error


def _check(name: str, train: Sequence[Question], test: Sequence[Question]) -> None:
    if not test:
        raise DataError(f"task {name} has no test question; nothing could be scored")
    for question in (*train, *test):
        if not question.answers:
            raise DataError(
                f"task {name}: question {question.key} has no answer; published test splits keep "
                "theirs back: take the validation split"
            )
        if question.choices and not set(question.answers) <= set(question.choices):
            raise DataError(f"task {name}: an answer of question {question.key} is no choice")
        if bool(question.choices) is not bool(test[0].choices):
            raise DataError(f"task {name}: some questions have choices and others have none")
    blank = next((question.key for question in train if not question.answers[0].strip()), None)
    if blank is not None:
        raise DataError(f"task {name}: question {blank} has a blank answer to learn; remove it")


def _check_words(name: str, words: Template, test: Sequence[Question]) -> None:
    """Told now: `cutlayer eval` would refuse the items when the model is trained already."""
    if not test[0].choices:
        return
    unknown = set(words.choices) - {choice for question in test for choice in question.choices}
    if unknown:
        raise DataError(
            f"task {name} has no choice {sorted(unknown)[0]!r}, which the template spells; "
            "name it as docs/published-tasks.md does"
        )
    for question in test:
        spelt = {words.written(choice, Form.CHAT) for choice in question.choices} - {""}
        if len(spelt) < max(len(question.choices), 2):
            raise DataError(
                f"task {name}: question {question.key} has no two different choices, or one is "
                "blank or written like another; mend it or the template's [choices]"
            )


def _row(question: Question, words: Template, form: Form) -> dict[str, object]:
    prompt = words.asked(question, form)
    completion = words.written(question.answers[0], form)
    if form is Form.PLAIN:
        return {"prompt": prompt, "completion": completion, "label": question.label}
    turns = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    return {"messages": turns, "label": question.label}


def _item(
    question: Question, words: Template, form: Form, task: PublishedTask
) -> dict[str, object]:
    prompt = words.asked(question, form)
    turns = [{"role": "user", "content": prompt}]
    if question.choices:
        return {
            "kind": "choice",
            **({"context": prompt} if form is Form.PLAIN else {"messages": turns}),
            "choices": [words.written(choice, form) for choice in question.choices],
            "answer": question.choices.index(question.answers[0]),
        }
    metric = task.main_metric if task.main_metric in METRICS.names else "f1"
    stop = words.stops(form)
    return {
        "kind": "generate",
        **({"prompt": prompt} if form is Form.PLAIN else {"messages": turns}),
        "answers": list(question.answers),
        "metrics": [metric],
        "max_new_tokens": task.max_new_tokens,
        **({"stop": list(stop)} if stop else {}),
    }


def _key(question: Question) -> Mapping[str, object]:
    return {
        "key": question.key,
        "group": question.group,
        "choices": question.choices,
        "answers": question.answers,
        "label": question.label,
    }


def _lines(rows: Iterable[Mapping[str, object]]) -> Iterator[bytes]:
    # Escaped, so that half a surrogate pair comes back to the reader, who names its row.
    return (json.dumps(dict(row)).encode() + b"\n" for row in rows)


def _key_of(record: Record) -> _Key:
    try:
        key = msgspec.convert(record.fields, _Key)
    except msgspec.ValidationError as error:
        raise DataError(f"{record.where}: {error}; write the task again") from error
    if not key.answers or (key.choices and not set(key.answers) <= set(key.choices)):
        raise DataError(
            f"{record.where}: no answer, or one that is no choice; write the task again"
        )
    return key
