"""ReCoRD: which entity of a news passage fills the gap in a sentence about it.

It makes no prompt (`templates`) and computes no score (`scores`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.columns import inner, inners, integer, read_distinct
from cutlayer.evaluation.published.original_files import texts_of
from cutlayer.evaluation.published.question import (
    TASKS,
    HubName,
    Prediction,
    Question,
    Scored,
    Split,
)
from cutlayer.evaluation.published.superglue import superglue_records

__all__ = ["ReCoRd"]

_GAP = "@placeholder"


@TASKS.register("record")
class ReCoRd:
    """The choices are the different entities that the passage's authors marked in it.

    `Question.fields`: passage, whose `@highlight` marks become list items, and query, which holds
    `@placeholder` where the entity is missing. A test split, whose answers the authors keep back,
    gives questions without answers.

    Source: Zhang et al., ReCoRD (arXiv 1810.12885), in SuperGLUE's files.
    """

    about = "which entity of a news passage is missing in a sentence"
    main_metric = "f1"
    max_new_tokens = 0
    hub: HubName | None = HubName(repository="aps/super_glue", config="record")

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Every query of the split's file, in its order; ends of spans count as inside."""
        lines = superglue_records(folder, "ReCoRD", split)
        return self.read_records((flat for line in lines for flat in _flattened(line)), split)

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Every record; keys are the split and the two numbers of `idx`."""
        numbers = "the two numbers of its idx together"
        return read_distinct(records, lambda record: _question(record, split), numbers)

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """F1 and exact match with the best answer."""
        from cutlayer.evaluation.published.scores import score_record

        return score_record(questions, predictions)


def _question(record: Record, split: Split) -> Question:
    choices = _different(record, "entities")
    if not choices:
        raise DataError(f"{record.where}: no entities to choose from; fetch the file again")
    query = record.text("query")
    if _GAP not in query:
        raise DataError(f"{record.where}: the query has no {_GAP} to fill; fetch the file again")
    idx = inner(record, "idx")
    return Question(
        key=f"{split.value}/{integer(idx, 'passage')}/{integer(idx, 'query')}",
        fields={"passage": _readable(record.text("passage")), "query": query},
        choices=choices,
        answers=_answers(record, choices, split),
    )


def _answers(record: Record, choices: Sequence[str], split: Split) -> tuple[str, ...]:
    given = _different(record, "answers")
    answers = tuple(answer for answer in given if answer in choices)
    if answers or (split is Split.TEST and not given):
        return answers
    raise DataError(f"{record.where}: no answer is one of the entities; fetch the file again")


def _different(record: Record, name: str) -> tuple[str, ...]:
    """Texts of a list, each once: spaces around them are not asked for, so they tell none apart."""
    texts = map(str.strip, texts_of(record.value(name), f"{record.where}: {name}"))
    return tuple(dict.fromkeys(text for text in texts if text))


def _readable(passage: str) -> str:
    return re.sub(r"\s*@highlight\s*", "\n- ", passage)


def _flattened(line: Record) -> Iterator[Record]:
    """A record with the hub's columns for each query of the authors' line."""
    passage = inner(line, "passage")
    entities = [_spanned(passage, entity) for entity in inners(passage, "entities")]
    for query in inners(line, "qas"):
        has_answers = "answers" in query.fields
        fields = {
            "passage": passage.text("text"),
            "query": query.text("query"),
            "entities": entities,
            "answers": [it.text("text") for it in inners(query, "answers")] if has_answers else [],
            "idx": {"passage": integer(line, "idx"), "query": integer(query, "idx")},
        }
        yield Record(fields, query.where)


def _spanned(passage: Record, entity: Record) -> str:
    text, start, end = passage.text("text"), integer(entity, "start"), integer(entity, "end")
    if not 0 <= start <= end < len(text):
        raise DataError(
            f"{entity.where}: {start} to {end} is not within the passage of {len(text)} "
            "characters; fetch the file again"
        )
    return text[start : end + 1]
