"""What every published task keeps to, whoever wrote it."""

import re
from pathlib import Path

import pytest

from cutlayer.data.sources import Record
from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import (
    TASKS,
    Prediction,
    PublishedTask,
    Question,
    Split,
)
from cutlayer.evaluation.published.templates import TEMPLATES

_NAMES = {
    "boolq",
    "cb",
    "cnn_dailymail",
    "copa",
    "coqa",
    "multirc",
    "record",
    "rte",
    "sentiment",
    "topics",
    "wic",
    "wsc",
    "xsum",
}


def test_every_task_of_the_published_tables_is_there_and_has_a_template() -> None:
    assert set(TASKS) == _NAMES == set(TEMPLATES)
    with pytest.raises(ConfigError, match="no published task is called 'squad'; known: boolq, cb"):
        published_task("squad")


@pytest.mark.parametrize("task", [published_task(name) for name in TASKS], ids=list(TASKS))
class TestEveryTask:
    def test_it_says_in_one_line_what_it_asks(self, task: PublishedTask) -> None:
        assert re.fullmatch(r"[a-z].{15,90}[a-z]", task.about)

    def test_its_hub_has_an_owner_and_a_name(self, task: PublishedTask) -> None:
        assert task.hub is None or re.fullmatch(r"[\w-]+/[\w-]+", task.hub.repository)

    def test_its_main_metric_has_a_value_for_each_question(self, task: PublishedTask) -> None:
        questions = [
            Question(key=f"{place}", group=f"{place}", choices=("no", "yes"), answers=("yes",))
            for place in range(2)
        ]
        scored = task.score(questions, [Prediction(text="yes"), Prediction(text="no")])
        assert scored.items[task.main_metric] == (1.0, 0.0)
        assert task.main_metric in scored.metrics

    def test_a_reply_has_a_length_that_ends(self, task: PublishedTask) -> None:
        assert 0 <= task.max_new_tokens <= 256

    @pytest.mark.parametrize("split", Split)
    def test_a_missing_folder_is_named(
        self, task: PublishedTask, split: Split, tmp_path: Path
    ) -> None:
        folder = tmp_path / "nothing"
        with pytest.raises(DataError, match=re.escape(str(folder))):
            task.read_original(folder, split)

    @pytest.mark.parametrize("split", Split)
    def test_a_folder_of_something_else_is_named(
        self, task: PublishedTask, split: Split, tmp_path: Path
    ) -> None:
        (tmp_path / "notes.txt").write_text("something else")
        with pytest.raises(DataError, match=re.escape(str(tmp_path))):
            task.read_original(tmp_path, split)

    def test_a_record_without_its_columns_is_named(self, task: PublishedTask) -> None:
        with pytest.raises(DataError, match=r"rows 1: no column"):
            task.read_records([Record({"other": "text"}, "rows 1")], Split.TRAIN)

    def test_no_records_are_no_questions_and_not_scored(self, task: PublishedTask) -> None:
        assert task.read_records([], Split.TRAIN) == []
        with pytest.raises(DataError, match="no questions"):
            task.score([], [])
