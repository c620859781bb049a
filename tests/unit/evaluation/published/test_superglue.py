"""SuperGLUE's layout read as questions: real field names, made-up rows; the hub's columns alike."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import Prediction, Question, Split

Row = Mapping[str, object]

_NLI: Row = {"premise": "It rains.", "hypothesis": "It is wet.", "idx": 7}
_ORIGINAL: dict[str, tuple[str, Row]] = {
    "boolq": (
        "BoolQ",
        {"question": "is it wet", "passage": "It rains.", "idx": 7, "label": True},
    ),
    "rte": ("RTE", {**_NLI, "label": "not_entailment"}),
    "cb": ("CB", {**_NLI, "label": "neutral"}),
    "wic": (
        "WiC",
        {
            "word": "bank",
            "sentence1": "A bank lends.",
            "sentence2": "The bank is steep.",
            "idx": 7,
            "label": False,
            "start1": 2,
            "start2": 4,
            "end1": 6,
            "end2": 8,
            "version": 1.1,
        },
    ),
    "copa": (
        "COPA",
        {
            "premise": "The floor was wet.",
            "choice1": "It was swept.",
            "choice2": "A pipe burst.",
            "question": "cause",
            "label": 1,
            "idx": 7,
        },
    ),
    "wsc": (
        "WSC",
        {
            "text": "Ann told Bea that he called, and he did.",
            "target": {"span1_text": "Ann", "span1_index": 0, "span2_text": "he", "span2_index": 7},
            "idx": 7,
            "label": False,
        },
    ),
}
_ANSWER = {
    "boolq": "yes",
    "rte": "not_entailment",
    "cb": "neutral",
    "wic": "no",
    "copa": "A pipe burst.",
    "wsc": "no",
}
_HUB_LABEL = {"boolq": 1, "rte": 1, "cb": 2, "wic": 0, "copa": 1, "wsc": 0}
_NAMES = sorted(_ORIGINAL)


def _write(folder: Path, name: str, *rows: Row, file: str = "val.jsonl") -> Path:
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def _original(task: str, folder: Path, split: Split = Split.VALIDATION) -> list[Question]:
    return published_task(task).read_original(folder, split)


def _hub_row(task: str) -> Row:
    row = dict(_ORIGINAL[task][1])
    target = row.pop("target", {})
    assert isinstance(target, dict)
    return {**row, **target, "label": _HUB_LABEL[task]}


def _hub(task: str, row: Row, split: Split = Split.VALIDATION) -> list[Question]:
    return published_task(task).read_records([Record(row, "hub row 1")], split)


def _without(row: Row, name: str) -> Row:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize("task", _NAMES)
def test_a_line_becomes_a_question_with_its_right_choice(task: str, tmp_path: Path) -> None:
    folder, row = _ORIGINAL[task]
    (question,) = _original(task, _write(tmp_path, folder, row))
    assert question.key == "validation/7"
    assert question.answers == (_ANSWER[task],)
    assert _ANSWER[task] in question.choices
    assert question.label


@pytest.mark.parametrize("task", _NAMES)
def test_the_hub_and_the_task_folder_give_the_same_questions(task: str, tmp_path: Path) -> None:
    folder, row = _ORIGINAL[task]
    _write(tmp_path, folder, row)
    questions = _original(task, tmp_path)
    assert _original(task, tmp_path / folder) == questions
    assert _hub(task, _hub_row(task)) == questions


@pytest.mark.parametrize("task", _NAMES)
def test_a_test_split_keeps_its_answers_back_and_is_not_scored(task: str, tmp_path: Path) -> None:
    folder, row = _ORIGINAL[task]
    _write(tmp_path, folder, _without(row, "label"), file="test.jsonl")
    (question,) = _original(task, tmp_path, Split.TEST)
    assert question.answers == ()
    assert question.choices
    assert _hub(task, {**_hub_row(task), "label": -1}, Split.TEST) == [question]
    assert _hub(task, {**_hub_row(task), "label": None}, Split.TEST) == [question]
    with pytest.raises(DataError, match="has no answer to score against"):
        published_task(task).score([question], [Prediction(text=question.choices[0])])


@pytest.mark.parametrize("task", _NAMES)
@pytest.mark.parametrize("label", [None, -1, 3, 0.0, "maybe", [1]])
def test_only_the_labels_of_the_task_are_taken(task: str, label: object, tmp_path: Path) -> None:
    folder, row = _ORIGINAL[task]
    _write(tmp_path, folder, row, {**row, "idx": 8, "label": label})
    with pytest.raises(DataError, match=r"val.jsonl:2: column 'label' holds no label .* 0 \("):
        _original(task, tmp_path)


@pytest.mark.parametrize("task", ["rte", "cb", "copa"])
def test_true_is_no_label_of_a_task_with_named_ones(task: str, tmp_path: Path) -> None:
    folder, row = _ORIGINAL[task]
    with pytest.raises(DataError, match="holds no label of the task"):
        _original(task, _write(tmp_path, folder, {**row, "label": True}))


@pytest.mark.parametrize("task", _NAMES)
def test_each_column_is_needed_and_has_its_type(task: str) -> None:
    row = _hub_row(task)
    needed = [*published_task(task).read_records([Record(row, "x")], Split.TRAIN)[0].fields]
    for name in {*needed, "idx", "label"} - {"marked_text"}:
        with pytest.raises(DataError, match=f"row 1: no column '{name}'"):
            _hub(task, _without(row, name))
        with pytest.raises(DataError, match=f"row 1: column '{name}'"):
            _hub(task, {**row, name: 2.5})


@pytest.mark.parametrize("task", _NAMES)
def test_a_truncated_or_doubled_line_is_named(task: str, tmp_path: Path) -> None:
    folder, row = _ORIGINAL[task]
    _write(tmp_path, folder, row, row)
    with pytest.raises(DataError, match=r"val.jsonl:2: a second record validation/7; its idx must"):
        _original(task, tmp_path)
    path = tmp_path / folder / "val.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)[:-9]}")
    with pytest.raises(DataError, match=r"val.jsonl:2: malformed JSON.*truncated"):
        _original(task, tmp_path)
    path.write_text("")
    with pytest.raises(DataError, match=r"val.jsonl has no records"):
        _original(task, tmp_path)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    folder, row = _ORIGINAL["cb"]
    with pytest.raises(DataError, match=r"holds no CB/test.jsonl or test.jsonl"):
        _original("cb", _write(tmp_path, folder, row), Split.TEST)


def test_copa_asks_for_one_of_two_different_texts() -> None:
    row = {**_hub_row("copa"), "choice1": "A pipe burst."}
    with pytest.raises(DataError, match="choice1 and choice2 are the same"):
        _hub("copa", row)


@pytest.mark.parametrize(
    ("span", "index", "expected"),
    [
        ("he", 4, "Ann told Bea that *he* called, and he did."),
        ("he", 7, "Ann told Bea that he called, and *he* did."),
        ("He", 7, "Ann told Bea that he called, and *he* did."),
        ("she", 7, "Ann told Bea that he called, and he did."),
        ("he", 99, "Ann told Bea that he called, and he did."),
    ],
)
def test_wsc_marks_the_pronoun_that_is_meant(span: str, index: int, expected: str) -> None:
    (question,) = _hub("wsc", {**_hub_row("wsc"), "span2_text": span, "span2_index": index})
    assert question.fields["marked_text"] == expected


def test_wsc_needs_its_target(tmp_path: Path) -> None:
    folder, row = _ORIGINAL["wsc"]
    with pytest.raises(DataError, match=r"val.jsonl:1: no column 'target'"):
        _original("wsc", _write(tmp_path, folder, _without(row, "target")))
    with pytest.raises(DataError, match=r"val.jsonl:1: target.* is no object"):
        _original("wsc", _write(tmp_path, folder, {**row, "target": "he"}))


def test_cb_has_the_mean_f1_of_its_classes_too() -> None:
    questions = [*_hub("cb", _hub_row("cb")), *_hub("cb", {**_hub_row("cb"), "label": 0})]
    scored = published_task("cb").score(questions, [Prediction(text="neutral")] * 2)
    assert scored.metrics["accuracy"] == 0.5
    assert scored.metrics["f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
