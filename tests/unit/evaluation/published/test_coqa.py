"""CoQA's two layouts make the same questions, and a damaged file is named."""

import copy
import json
from pathlib import Path

import datasets
import pytest

from cutlayer.data.sources import Record, read_records
from cutlayer.errors import DataError
from cutlayer.evaluation.published.coqa import Coqa
from cutlayer.evaluation.published.question import Prediction, Question, Split

Story = dict[str, object]

STORY = "Ann has a red boat.\nBob has none."
QUESTIONS = ["Who has a boat?", "Which colour is\nit?", "Does Bob have one?"]
ANSWERS = ["Ann", "red", "no"]
FURTHER = {"0": ["Ann", "it is red", "No."], "1": ["Ann does", "red", "none"]}


def turns(texts: list[str]) -> list[dict[str, object]]:
    """Made-up turns in the layout of the published files."""
    return [
        {"input_text": text, "turn_id": number, "span_text": "not read"}
        for number, text in enumerate(texts, start=1)
    ]


def story(story_id: str = "s1", *, has_further: bool = True) -> Story:
    further = {name: turns(texts) for name, texts in FURTHER.items()}
    return {
        "source": "mctest",
        "id": story_id,
        "story": STORY,
        "questions": turns(QUESTIONS),
        "answers": turns(ANSWERS),
        **({"additional_answers": further} if has_further else {}),
    }


def written(folder: Path, stories: object, name: str = "coqa-dev-v1.0.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"version": "1.0", "data": stories}))
    return path


def read(folder: Path, split: Split = Split.VALIDATION) -> list[Question]:
    return Coqa().read_original(folder, split)


def hub_rows() -> list[dict[str, object]]:
    answers = {"input_text": ANSWERS, "answer_start": [0, 10, 20], "answer_end": [3, 13, 33]}
    return [{"source": "mctest", "story": STORY, "questions": QUESTIONS, "answers": answers}]


def test_every_turn_is_asked_with_the_history_before_it(tmp_path: Path) -> None:
    written(tmp_path, [story()])
    first, second, third = read(tmp_path)
    assert first.fields == {"story": STORY, "history": "", "question": "Who has a boat?"}
    assert second.fields["history"] == "Q: Who has a boat?\nA: Ann"
    assert third.fields["history"] == ("Q: Who has a boat?\nA: Ann\nQ: Which colour is it?\nA: red")
    assert [turn.key for turn in (first, second, third)] == ["s1/1", "s1/2", "s1/3"]
    assert {turn.group for turn in (first, second, third)} == {"s1"}
    assert {turn.label for turn in (first, second, third)} == {"mctest"}


def test_answers_of_all_annotators_are_kept_also_equal_ones(tmp_path: Path) -> None:
    written(tmp_path, [story()])
    assert [turn.answers for turn in read(tmp_path)] == [
        ("Ann", "Ann", "Ann does"),
        ("red", "it is red", "red"),
        ("no", "No.", "none"),
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("coqa-train-v1.0.json", Split.TRAIN),
        ("coqa-dev-v1.0.json", Split.VALIDATION),
        ("coqa-test-v1.0.json", Split.TEST),
        ("coqa.test.json", Split.TEST),
    ],
)
def test_each_split_has_its_file(tmp_path: Path, name: str, split: Split) -> None:
    path = written(tmp_path, [story(has_further=False)], name)
    assert [turn.answers for turn in read(tmp_path, split)] == [("Ann",), ("red",), ("no",)]
    assert read(path, split) == read(tmp_path, split)
    other = next(other for other in Split if other is not split)
    with pytest.raises(DataError, match=r"holds no coqa-.*fetch the original"):
        read(tmp_path, other)


def test_the_hub_s_columns_make_the_same_questions_but_for_keys(tmp_path: Path) -> None:
    written(tmp_path, [story(has_further=False)])
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(hub_rows()).to_parquet(path)
    found = Coqa().read_records(read_records(path), Split.TRAIN)
    original = read(tmp_path)
    assert [turn.fields for turn in found] == [turn.fields for turn in original]
    assert [turn.answers for turn in found] == [turn.answers for turn in original]
    assert [turn.label for turn in found] == [turn.label for turn in original]
    assert [turn.key for turn in found] == ["train-1/1", "train-1/2", "train-1/3"]
    assert {turn.group for turn in found} == {"train-1"}


def test_answers_written_as_a_list_of_objects_are_read_too() -> None:
    (row,) = hub_rows()
    listed = {**row, "answers": turns(ANSWERS)}
    as_hub, as_list = (
        Coqa().read_records([Record(fields, "row 1")], Split.TRAIN) for fields in (row, listed)
    )
    assert as_hub == as_list


def test_a_turn_that_nobody_answered_is_history_only(tmp_path: Path) -> None:
    damaged = story(has_further=False)
    damaged["answers"] = turns(["Ann", " ", "no"])
    written(tmp_path, [damaged])
    assert [turn.key for turn in read(tmp_path)] == ["s1/1", "s1/3"]
    assert read(tmp_path)[1].fields["history"].endswith("Q: Which colour is it?\nA: ")


def test_right_answers_score_as_a_human_does(tmp_path: Path) -> None:
    written(tmp_path, [story()])
    questions = read(tmp_path)
    scored = Coqa().score(questions, [Prediction(text=turn.answers[0]) for turn in questions])
    assert scored.items[Coqa.main_metric][0] == pytest.approx(1.0)
    with pytest.raises(DataError, match="2 predictions for 3 questions"):
        Coqa().score(questions, [Prediction(text="x")] * 2)


def without_last(name: str) -> Story:
    damaged = story()
    damaged[name] = turns(QUESTIONS[:-1])
    return damaged


def with_turn_ids(*ids: int) -> Story:
    damaged = story()
    damaged["answers"] = [
        {"input_text": text, "turn_id": turn_id} for text, turn_id in zip(ANSWERS, ids, strict=True)
    ]
    return damaged


def with_value(name: str, value: object) -> Story:
    return {**copy.deepcopy(story()), name: value}


@pytest.mark.parametrize(
    ("stories", "message"),
    [
        ([without_last("answers")], r"data\[0\]: 3 questions and 2 answers"),
        ([without_last("questions")], r"data\[0\]: 2 questions and 3 answers"),
        ([with_value("additional_answers", {"0": turns(["x"])})], "3 questions and 1 answers"),
        ([with_value("additional_answers", [])], r"additional_answers is no object"),
        ([story("a"), with_turn_ids(1, 3, 2)], r"data\[1\]\.answers\[1\]: turn_id is not 2"),
        ([with_value("answers", None)], r"data\[0\]\.answers is no list"),
        ([with_value("questions", [{"turn_id": 1}])], "no column 'input_text'"),
        ([with_value("questions", [])], "0 questions and 3 answers"),
        ([with_value("story", 7)], "'story' is a value of type int, expected text"),
        ([{"id": "s1"}], "no column 'questions'"),
        ([story(), story()], "'s1/1' appear twice"),
        (["s1"], r"data\[0\] is no object"),
        ({}, "data is no list"),
    ],
)
def test_a_damaged_story_is_named(tmp_path: Path, stories: object, message: str) -> None:
    path = written(tmp_path, stories)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)
    assert "red" not in str(caught.value).split(str(path))[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("[]", "no JSON object"), ("{}", "no column 'data'"), ('{"da', "truncated")],
)
def test_a_file_that_is_no_coqa_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "coqa-dev-v1.0.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("answers", {"input_text": ["Ann"]}, "row 1: 3 questions and 1 answers"),
        ("answers", {"texts": ANSWERS}, "no column 'input_text'"),
        ("answers", "Ann", "answers is no list"),
        ("questions", "Who?", "row 1: questions is no list"),
        ("questions", [1, 2, 3], "row 1: questions: column '0' is a value of type int"),
        ("source", None, "'source' is null"),
    ],
)
def test_a_hub_record_of_another_form_is_refused(column: str, value: object, message: str) -> None:
    (row,) = hub_rows()
    with pytest.raises(DataError, match=message):
        Coqa().read_records([Record({**row, column: value}, "row 1")], Split.TRAIN)
