"""MultiRC and ReCoRD: several questions in a line, spans with ends inside; made-up rows."""

import json
from pathlib import Path

import pytest

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import Prediction, Question, Split

Row = dict[str, object]

_PARAGRAPH = "Ann baked. Bea ate."
_MULTIRC: Row = {
    "idx": 3,
    "version": 1.1,
    "passage": {
        "text": _PARAGRAPH,
        "questions": [
            {
                "question": "Who baked?",
                "idx": 5,
                "answers": [
                    {"text": "Ann", "idx": 10, "label": 1},
                    {"text": "Bea", "idx": 11, "label": 0},
                ],
            },
            {
                "question": "Who ate?",
                "idx": 6,
                "answers": [{"text": "Bea", "idx": 12, "label": 1}],
            },
        ],
    },
}
_PASSAGE = "Ann met Bea in Rome. Ann left.\n@highlight\nAnn met Bea"
_RECORD: Row = {
    "idx": 3,
    "source": "made up",
    "passage": {
        "text": _PASSAGE,
        "entities": [
            {"start": 0, "end": 2},
            {"start": 8, "end": 10},
            {"start": 15, "end": 18},
            {"start": 21, "end": 23},
        ],
    },
    "qas": [
        {
            "query": "Later @placeholder left.",
            "idx": 4,
            "answers": [
                {"start": 0, "end": 2, "text": "Ann"},
                {"start": 21, "end": 23, "text": "Ann"},
                {"start": 0, "end": 5, "text": "Ann me"},
            ],
        },
        {
            "query": "They were in @placeholder.",
            "idx": 5,
            "answers": [{"start": 15, "end": 18, "text": "Rome"}],
        },
    ],
}
_HUB_MULTIRC: list[Row] = [
    {
        "paragraph": _PARAGRAPH,
        "question": question,
        "answer": answer,
        "idx": dict(zip(("paragraph", "question", "answer"), idx, strict=True)),
        "label": label,
    }
    for question, answer, idx, label in (
        ("Who baked?", "Ann", (3, 5, 10), 1),
        ("Who baked?", "Bea", (3, 5, 11), 0),
        ("Who ate?", "Bea", (3, 6, 12), 1),
    )
]
_HUB_RECORD: list[Row] = [
    {
        "passage": _PASSAGE,
        "query": query,
        "entities": ["Ann", "Bea", "Rome"],
        "answers": [answer],
        "idx": {"passage": 3, "query": idx},
    }
    for query, answer, idx in (
        ("Later @placeholder left.", "Ann", 4),
        ("They were in @placeholder.", "Rome", 5),
    )
]


def _read(task: str, folder: Path, row: object, split: Split = Split.TRAIN) -> list[Question]:
    names = {"multirc": "MultiRC", "record": "ReCoRD"}
    path = folder / names[task] / ("test.jsonl" if split is Split.TEST else "train.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{json.dumps(row)}\n")
    return published_task(task).read_original(folder, split)


def _hub(task: str, rows: list[Row], split: Split = Split.TRAIN) -> list[Question]:
    records = [Record(row, f"row {number}") for number, row in enumerate(rows, start=1)]
    return published_task(task).read_records(records, split)


def _changed(row: Row, text: str, other: str) -> object:
    """The row with one piece of its JSON replaced, wherever it is nested."""
    raw = json.dumps(row)
    assert text in raw
    return json.loads(raw.replace(text, other))


def test_each_option_is_a_question_grouped_by_what_is_asked(tmp_path: Path) -> None:
    questions = _read("multirc", tmp_path, _MULTIRC)
    assert [question.key for question in questions] == [
        "train/3/5/10",
        "train/3/5/11",
        "train/3/6/12",
    ]
    assert [question.group for question in questions] == ["train/3/5", "train/3/5", "train/3/6"]
    assert [question.answers for question in questions] == [("yes",), ("no",), ("yes",)]
    assert {question.choices for question in questions} == {("no", "yes")}
    assert questions[1].fields == {
        "paragraph": _PARAGRAPH,
        "question": "Who baked?",
        "answer": "Bea",
    }
    assert _hub("multirc", _HUB_MULTIRC) == questions


def test_multirc_counts_whole_questions_by_their_group(tmp_path: Path) -> None:
    questions = _read("multirc", tmp_path, _MULTIRC)
    predictions = [Prediction(text=text) for text in ("yes", "yes", "yes")]
    scored = published_task("multirc").score(questions, predictions)
    assert scored.metrics["em"] == 0.5
    assert scored.metrics["f1a"] == pytest.approx(2 * 2 / 5)
    assert scored.items["accuracy"] == (1.0, 0.0, 1.0)


def test_each_query_chooses_among_the_different_entities(tmp_path: Path) -> None:
    first, second = _read("record", tmp_path, _RECORD)
    assert first.choices == second.choices == ("Ann", "Bea", "Rome")
    assert (first.key, second.key) == ("train/3/4", "train/3/5")
    # The third answer of the first is no entity, the second is the first again.
    assert (first.answers, second.answers) == (("Ann",), ("Rome",))
    assert first.fields["passage"] == "Ann met Bea in Rome. Ann left.\n- Ann met Bea"
    assert first.fields["query"] == "Later @placeholder left."
    assert _hub("record", _HUB_RECORD) == [first, second]


def test_spaces_around_an_entity_make_no_second_choice() -> None:
    row = {**_HUB_RECORD[0], "entities": ["Bea", "Ann ", "Ann", " "], "answers": [" Ann"]}
    (question,) = _hub("record", [row])
    assert (question.choices, question.answers) == (("Bea", "Ann"), ("Ann",))


def test_test_splits_keep_their_answers_back(tmp_path: Path) -> None:
    unlabelled = _changed(_MULTIRC, ', "label": 1', "")
    assert isinstance(unlabelled, dict)
    options = _read("multirc", tmp_path, _changed(unlabelled, ', "label": 0', ""), Split.TEST)
    assert [option.answers for option in options] == [(), (), ()]
    assert _hub("multirc", [{**row, "label": -1} for row in _HUB_MULTIRC], Split.TEST) == options
    bare = json.loads(json.dumps(_RECORD))
    for query in bare["qas"]:
        del query["answers"]
    queries = _read("record", tmp_path, bare, Split.TEST)
    assert [query.answers for query in queries] == [(), ()]
    assert _hub("record", [{**row, "answers": []} for row in _HUB_RECORD], Split.TEST) == queries
    with pytest.raises(DataError, match="no answer is one of the entities"):
        _read("record", tmp_path, bare)


@pytest.mark.parametrize(
    ("text", "other", "message"),
    [
        ('"idx": 12', '"idx": "12"', r"questions\[1\]: answers\[0\]: column 'idx' is no whole"),
        ('"idx": 3', '"idx": true', r"train.jsonl:1: column 'idx' is no whole number"),
        ('"label": 0', '"label": 2', r"answers\[1\]: column 'label' holds no label"),
        (', "label": 0', "", r"answers\[1\]: no column 'label'"),
        ('"questions"', '"question"', r"train.jsonl:1: passage: no column 'questions'"),
        ('"text": "Ann"', '"text": null', r"answers\[0\]: column 'text' is null"),
        (
            '"idx": 11',
            '"idx": 10',
            r"answers\[1\]: a second record train/3/5/10; the three numbers",
        ),
    ],
)
def test_what_is_wrong_in_multirc_is_named(
    text: str, other: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        _read("multirc", tmp_path, _changed(_MULTIRC, text, other))


@pytest.mark.parametrize(
    ("text", "other", "message"),
    [
        ('"end": 18', '"end": 180', r"passage: entities\[2\]: 15 to 180 is not within"),
        ('"start": 15', '"start": 19', r"entities\[2\]: 19 to 18 is not within the passage of 53"),
        ('"start": 8', '"start": -8', r"entities\[1\]: -8 to 10 is not within"),
        ("@placeholder left", "She left", r"qas\[0\]: the query has no @placeholder"),
        ('"text": "Rome"', '"text": "Paris"', r"qas\[1\]: no answer is one of the entities"),
        ('"text": "Rome"', '"text": 4', r"qas\[1\]: answers\[0\]: column 'text' is"),
        ('"qas"', '"queries"', r"train.jsonl:1: no column 'qas'"),
        (
            '"idx": 5',
            '"idx": 4',
            r"qas\[1\]: a second record train/3/4; the two numbers of its idx",
        ),
    ],
)
def test_what_is_wrong_in_record_is_named(
    text: str, other: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        _read("record", tmp_path, _changed(_RECORD, text, other))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("entities", [], "row 1: no entities to choose from"),
        ("entities", "Ann", "row 1: entities is no list"),
        ("answers", [1], "row 1: answers: column '0' is a value of type int"),
        ("idx", 4, "row 1: idx.* is no object"),
        ("passage", None, "row 1: column 'passage' is null"),
    ],
)
def test_wrong_types_of_hub_columns_are_named(column: str, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _hub("record", [{**_HUB_RECORD[0], column: value}])
