"""Topics: which of five topics does a news article have, by its first words?

It makes no prompt (`templates`) and computes no score (`scores`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cutlayer.data.sources import Record
from cutlayer.data.topics import TOPICS, openings
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

__all__ = ["Topics"]


@TASKS.register("topics")
class Topics:
    """One text per question; rows are told apart by their topic.

    Source: Greene and Cunningham, Practical Solutions to the Problem of Diagonal Dominance in
        Kernel Document Clustering (ICML 2006), who collected the articles.
    """

    about = "which of five topics has a news article, by its first 30 words"
    main_metric = "accuracy"
    max_new_tokens = 0
    hub: HubName | None = None

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Beginnings of the articles of the asset `bbcnews`, in our own split.

        A story counts once. In the order of the hashes of their first 30 words the first quarter is
        the test split; the training split is what follows, without beginnings that resemble one of
        the test split.
        """
        rows = own_split(openings(folder), lambda row: row.text, split, f"topics in {folder}")
        return [
            text_question(text_key(split, row.text), row.text, row.topic, TOPICS) for row in rows
        ]

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Records with columns text and label, a topic or its number in `TOPICS`."""
        return text_questions(records, TOPICS, split)

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """Accuracy."""
        from cutlayer.evaluation.published.scores import score_choices

        return score_choices(questions, predictions)
