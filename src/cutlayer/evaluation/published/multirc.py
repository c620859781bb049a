"""MultiRC: which of a question's options are right, each judged on its own.

It makes no prompt (`templates`) and computes no score (`scores`).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cutlayer.data.sources import Record
from cutlayer.evaluation.published.columns import (
    NO_YES,
    inner,
    inners,
    integer,
    named_label,
    read_distinct,
)
from cutlayer.evaluation.published.question import (
    TASKS,
    HubName,
    Prediction,
    Question,
    Scored,
    Split,
)
from cutlayer.evaluation.published.superglue import superglue_records

__all__ = ["MultiRc"]

_KEYS = ("paragraph", "question", "answer")


@TASKS.register("multirc")
class MultiRc:
    """One `Question` per option; those of one question share `group`, which the score needs.

    `Question.fields`: paragraph, question and answer (the option). A test split, whose labels the
    authors keep back, gives questions without answers.

    Source: Khashabi et al., Looking Beyond the Surface (NAACL 2018), in SuperGLUE's files.
    """

    about = "is an option a right answer to a question about a paragraph"
    main_metric = "accuracy"
    max_new_tokens = 0
    hub: HubName | None = HubName(repository="aps/super_glue", config="multirc")

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Every option of the split's file, in its order."""
        lines = superglue_records(folder, "MultiRC", split)
        return self.read_records((flat for line in lines for flat in _flattened(line)), split)

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Every record; keys are the split and the three numbers of `idx`."""
        numbers = "the three numbers of its idx together"
        return read_distinct(records, lambda record: _question(record, split), numbers)

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """F1 over options, exact match over questions, and accuracy of each option."""
        from cutlayer.evaluation.published.scores import score_multirc

        return score_multirc(questions, predictions)


def _question(record: Record, split: Split) -> Question:
    label = named_label(record, NO_YES, split)
    idx = inner(record, "idx")
    paragraph, question, answer = (integer(idx, name) for name in _KEYS)
    group = f"{split.value}/{paragraph}/{question}"
    return Question(
        key=f"{group}/{answer}",
        group=group,
        fields={name: record.text(name) for name in _KEYS},
        choices=NO_YES,
        answers=() if label is None else (label,),
        label=label or "",
    )


def _flattened(line: Record) -> Iterator[Record]:
    """A record with the hub's columns for each option of the authors' line."""
    passage = inner(line, "passage")
    for question in inners(passage, "questions"):
        for option in inners(question, "answers"):
            numbers = (line, question, option)
            fields = {
                "paragraph": passage.text("text"),
                "question": question.text("question"),
                "answer": option.text("text"),
                "idx": {k: integer(it, "idx") for k, it in zip(_KEYS, numbers, strict=True)},
            }
            kept = {"label": option.fields["label"]} if "label" in option.fields else {}
            yield Record({**fields, **kept}, option.where)
