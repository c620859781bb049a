"""A made-up task (under a registered name) and a tiny model: runs of the suite take a moment."""

from pathlib import Path

import msgspec

import cutlayer.evaluation.published.catalogue  # noqa: F401 - registers the tasks
from cutlayer.evaluation.published.question import Question
from cutlayer.evaluation.published.task_files import Provenance, TaskFolder, write_task
from cutlayer.evaluation.published.templates import Form, Template
from cutlayer.suite.compute import Compute
from cutlayer.suite.spec import Method, RunSpec, Sizes

ONE_THREAD = Compute(threads=1)
CHOICES = ("entailment", "not_entailment")
_WORDS = Template(
    prompt="{text}:", choices={"entailment": "yes", "not_entailment": "no"}, stop=("!",)
)

SIZES = Sizes(train_rows=24, test_rows=4, steps=4, rows_per_step=8, micro_batch_rows=3, lr=0.01)


def tiny_spec(model: Path, method: Method, **changes: object) -> RunSpec:
    """A run of a tiny model of four blocks, two of them the trunk's; keys of sizes too."""
    sizes = {key: changes.pop(key) for key in list(changes) if key in Sizes.__struct_fields__}
    spec = RunSpec(
        task="coqa",
        method=method,
        seed=1,
        sizes=msgspec.structs.replace(SIZES, **sizes),
        model=str(model),
        head_blocks=1,
        tail_blocks=1,
    )
    return msgspec.structs.replace(spec, **changes)


def tiny_task(folder: Path, num_train: int = 24, num_test: int = 4) -> TaskFolder:
    """Choices that follow from a row's letters; rows of different lengths."""
    rows = [_choice(number) for number in range(num_train + num_test)]
    return _written(rows, num_train, folder)


def tiny_replies(folder: Path, num_train: int = 24, num_test: int = 2) -> TaskFolder:
    """The same letters, and a word to write."""
    rows = [_reply(number) for number in range(num_train + num_test)]
    return _written(rows, num_train, folder)


def _written(rows: list[Question], num_train: int, folder: Path) -> TaskFolder:
    about = Provenance(source="packaged", is_demo_scale=True)
    return write_task("coqa", rows[:num_train], rows[num_train:], folder, Form.PLAIN, about, _WORDS)


def _choice(number: int) -> Question:
    return Question(
        key=str(number),
        fields={"text": "ab" * (1 + number % 5) + "yn"[number % 2]},
        choices=CHOICES,
        answers=(CHOICES[number % 2],),
        label=CHOICES[number % 2],
    )


def _reply(number: int) -> Question:
    return Question(
        key=str(number),
        group="story",
        fields={"text": "ab" * (1 + number % 5)},
        answers=("cd!",),
        label="story",
    )
