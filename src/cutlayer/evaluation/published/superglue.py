"""Six tasks of SuperGLUE that choose one answer: BoolQ, RTE, WiC, CB, COPA and WSC.

It makes no prompt (`templates`) and computes no score (`scores`). MultiRC and ReCoRD, whose files
nest several questions in one line, have modules of their own.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.columns import (
    NO_YES,
    inner,
    integer,
    named_label,
    read_distinct,
)
from cutlayer.evaluation.published.original_files import file_of, json_lines
from cutlayer.evaluation.published.question import (
    TASKS,
    HubName,
    Prediction,
    Question,
    Scored,
    Split,
)

__all__ = ["BoolQ", "Cb", "Copa", "Rte", "SuperGlueChoice", "Wic", "Wsc", "superglue_records"]

_FILES = {
    Split.TRAIN: "train.jsonl",
    Split.VALIDATION: "val.jsonl",
    Split.TEST: "test.jsonl",
}
_REPOSITORY = "aps/super_glue"


def superglue_records(folder: Path, task_folder: str, split: Split) -> Iterator[Record]:
    """Lines of one of SuperGLUE's files.

    Args:
        folder: the benchmark's folder, or the task's.
        task_folder: the task's folder in the benchmark's, such as `BoolQ`.
        split: each is one file.

    Raises:
        DataError: no such file; the iterator raises it for a malformed line.

    Source: the archives of SuperGLUE version 2.0.
    """
    name = _FILES[split]
    return json_lines(file_of(folder, (f"{task_folder}/{name}", name)))


class SuperGlueChoice:
    """What these tasks share: texts, and one label out of a few per line.

    A test split, whose labels the authors keep back, gives questions without answers.
    """

    about = ""
    main_metric = "accuracy"
    max_new_tokens = 0
    hub: HubName | None = None
    folder = ""
    """The task's folder in SuperGLUE's."""
    texts: tuple[str, ...] = ()
    """Columns that become `Question.fields`."""
    labels: tuple[str, ...] = NO_YES
    """In the order of the hub's numbers."""

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Every line of the split's file."""
        return self.read_records(superglue_records(folder, self.folder, split), split)

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Every record; keys are the split and `idx`."""
        return read_distinct(records, lambda record: self._question(record, split), "its idx")

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """Accuracy."""
        from cutlayer.evaluation.published.scores import score_choices

        return score_choices(questions, predictions)

    def _question(self, record: Record, split: Split) -> Question:
        label = named_label(record, self.labels, split)
        return Question(
            key=_key(record, split),
            fields={name: record.text(name) for name in self.texts},
            choices=self.labels,
            answers=() if label is None else (label,),
            label=label or "",
        )


@TASKS.register("boolq")
class BoolQ(SuperGlueChoice):
    """Source: Clark et al., BoolQ (arXiv 1905.10044)."""

    about = "is the answer to a question yes or no, given a passage"
    hub: HubName | None = HubName(repository=_REPOSITORY, config="boolq")
    folder = "BoolQ"
    texts = ("passage", "question")


@TASKS.register("rte")
class Rte(SuperGlueChoice):
    """Source: the RTE challenges 1, 2, 3 and 5, as GLUE (arXiv 1804.07461) joins them."""

    about = "does a premise entail a hypothesis"
    hub: HubName | None = HubName(repository=_REPOSITORY, config="rte")
    folder = "RTE"
    texts = ("premise", "hypothesis")
    labels = ("entailment", "not_entailment")


@TASKS.register("wic")
class Wic(SuperGlueChoice):
    """Source: Pilehvar and Camacho-Collados, WiC (arXiv 1808.09121)."""

    about = "does a word mean the same in two sentences"
    hub: HubName | None = HubName(repository=_REPOSITORY, config="wic")
    folder = "WiC"
    texts = ("word", "sentence1", "sentence2")


@TASKS.register("cb")
class Cb(SuperGlueChoice):
    """Source: de Marneffe et al., The CommitmentBank (Sinn und Bedeutung 23, 2019)."""

    about = "does a premise entail a hypothesis, contradict it, or neither"
    hub: HubName | None = HubName(repository=_REPOSITORY, config="cb")
    folder = "CB"
    texts = ("premise", "hypothesis")
    labels = ("entailment", "contradiction", "neutral")

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """Accuracy, and F1 as the plain mean over classes."""
        from cutlayer.evaluation.published.scores import score_cb

        return score_cb(questions, predictions)


@TASKS.register("copa")
class Copa(SuperGlueChoice):
    """The choices are the two alternatives themselves; rows are told apart by cause and effect.

    Source: Roemmele et al., Choice of Plausible Alternatives (AAAI spring symposium, 2011).
    """

    about = "which of two alternatives is the cause or effect of a premise"
    hub: HubName | None = HubName(repository=_REPOSITORY, config="copa")
    folder = "COPA"
    texts = ("premise", "question", "choice1", "choice2")
    labels = ("choice1", "choice2")

    def _question(self, record: Record, split: Split) -> Question:
        right = named_label(record, self.labels, split)
        choices = tuple(record.text(name) for name in self.labels)
        if len(set(choices)) < len(choices):
            raise DataError(f"{record.where}: choice1 and choice2 are the same; remove the line")
        return Question(
            key=_key(record, split),
            fields={name: record.text(name) for name in self.texts},
            choices=choices,
            answers=() if right is None else (record.text(right),),
            label=record.text("question"),
        )


@TASKS.register("wsc")
class Wsc(SuperGlueChoice):
    """`Question.fields` has `marked_text` too: the text with stars around the pronoun in question.

    Source: Levesque et al., The Winograd Schema Challenge (KR 2012).
    """

    about = "does a pronoun stand for a name or noun of its text"
    # Its spans are repaired where the authors' do not fit the text.
    hub: HubName | None = HubName(repository=_REPOSITORY, config="wsc.fixed")
    folder = "WSC"
    texts = ("text", "span1_text", "span2_text")

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Every line of the split's file, whose spans stand in an object `target`."""
        lines = superglue_records(folder, self.folder, split)
        return self.read_records(map(_without_target, lines), split)

    def _question(self, record: Record, split: Split) -> Question:
        plain = super()._question(record, split)
        marked_text = _marked(
            record.text("text"), record.text("span2_text"), integer(record, "span2_index")
        )
        return Question(
            key=plain.key,
            fields={**plain.fields, "marked_text": marked_text},
            choices=plain.choices,
            answers=plain.answers,
            label=plain.label,
        )


def _key(record: Record, split: Split) -> str:
    return f"{split.value}/{integer(record, 'idx')}"


def _without_target(record: Record) -> Record:
    return Record({**record.fields, **inner(record, "target").fields}, record.where)


def _marked(text: str, span: str, index: int) -> str:
    """The text with stars around the span that begins at a word; as it is where they disagree.

    A few of the authors' spans differ from their text in case or in a full stop.
    """
    words = list(re.finditer(r"\S+", text))
    if not 0 <= index < len(words):
        return text
    start = words[index].start()
    end = start + len(span)
    if text[start:end].casefold() != span.casefold():
        return text
    return f"{text[:start]}*{text[start:end]}*{text[end:]}"
