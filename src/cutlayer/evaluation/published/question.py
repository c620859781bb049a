"""One question of a published task, whatever file it came from, and what a task must offer.

It reads and scores nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from cutlayer.data.sources import Record
from cutlayer.registry import Registry

__all__ = ["TASKS", "HubName", "Prediction", "PublishedTask", "Question", "Scored", "Split"]


class Split(StrEnum):
    """Part of a task's rows."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, kw_only=True)
class HubName:
    """Where a model hub has the task."""

    repository: str
    """`owner/name`."""
    config: str | None = None
    """One of several tasks there."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and what would be right."""

    key: str
    """Unique within the task: ties a prediction to its gold answer."""
    group: str = ""
    """Questions that the official score counts as one, such as the options of MultiRC."""
    fields: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Texts that a template is made of, by name."""
    choices: tuple[str, ...] = field(default=(), repr=False)
    """What may be answered, such as `yes` and `no`; empty: a reply is written."""
    answers: tuple[str, ...] = field(repr=False)
    """Right answers, the first to be learnt; of a choice each is one of `choices`. Empty where the
    file keeps them back, as published test splits do."""
    label: str = ""
    """What owners may differ in (a topic, a source): rows are shared out by it."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model answered."""

    text: str = field(repr=False)
    """The choice, as in `Question.choices`, or the reply."""
    log_likelihoods: tuple[float, ...] = field(default=(), repr=False)
    """Of each choice, in nats; empty for a reply."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How good predictions are."""

    metrics: Mapping[str, float]
    """The task's official numbers, 0 to 1, by name."""
    items: Mapping[str, tuple[float, ...]]
    """Of the metrics that have one value for each question: those, in the order of questions."""


class PublishedTask(Protocol):
    """A task of the published tables; an instance is registered in `TASKS` by its name."""

    about: str
    """What it asks, in one line."""
    main_metric: str
    """Key of `Scored.items` by which runs are compared."""
    max_new_tokens: int
    """Of a reply; a choice has none, 0."""
    hub: HubName | None
    """None: no hub has it."""

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Questions of the files as their authors pass them on.

        Raises:
            DataError: files are missing, truncated or malformed, or there is no such split.
        """
        ...

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Questions of records with the hub's columns, also from a local file with those.

        Raises:
            DataError: a column is missing or has another type.
        """
        ...

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """The official score.

        Raises:
            DataError: not one prediction for each question, or a question without an answer.
            ConfigError: a metric needs a package that is not installed.
        """
        ...


TASKS: Registry[PublishedTask] = Registry("published task")
"""By name. Import `published.catalogue` to have them all."""
