"""Sentiment: is a snippet of a movie review positive or negative?

It makes no prompt (`templates`) and computes no score (`scores`). Raters' doubts are not left out
here, as they are for the four owners of `data.domains`: only a score of zero has no sentiment.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cutlayer.data.domains import SENTIMENTS, DomainRecord, distinct_records, snippets
from cutlayer.data.sources import Record
from cutlayer.evaluation.published.columns import text_question, text_questions
from cutlayer.evaluation.published.own_split import own_split, text_key
from cutlayer.evaluation.published.question import (
    TASKS,
    HubName,
    Prediction,
    Question,
    Scored,
    Split,
)

__all__ = ["Sentiment"]


@TASKS.register("sentiment")
class Sentiment:
    """One text per question; rows are told apart by their sentiment.

    Source: Hutto and Gilbert, VADER (ICWSM 2014), whose raters scored the snippets that Pang and
        Lee (arXiv cs/0506075) took from reviews; a hub has those with their first labels.
    """

    about = "is a snippet of a movie review positive or negative"
    main_metric = "accuracy"
    max_new_tokens = 0
    hub: HubName | None = HubName(repository="cornell-movie-review-data/rotten_tomatoes")

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Snippets of the asset `sentiment`, in our own split.

        Every distinct snippet counts whose score is not zero, its sign being the sentiment. In the
        order of the hashes of their texts the first quarter is the test split; the training split
        is what follows, without snippets that resemble one of the test split.
        """
        scored = (
            DomainRecord(text, SENTIMENTS[score > 0])
            for score, text in snippets(folder, "movies")
            if score
        )
        rows = own_split(
            list(distinct_records(scored)), lambda row: row.text, split, f"sentiment in {folder}"
        )
        return [
            text_question(text_key(split, row.text), row.text, row.sentiment, SENTIMENTS)
            for row in rows
        ]

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Records with columns text and label: 0 or negative, 1 or positive."""
        return text_questions(records, SENTIMENTS, split)

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """Accuracy."""
        from cutlayer.evaluation.published.scores import score_choices

        return score_choices(questions, predictions)
