"""Whatever stands in whatever place of a line: questions, or an error of ours that names the line.

One row of each task, made up; every value in it is replaced by every kind of JSON value in turn.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.errors import DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import Split
from cutlayer.evaluation.published.templates import Form, template_of

_OTHERS: tuple[object, ...] = (None, True, -1, 2**70, 1.5, "x", "\ud800", "", [], [[]], {}, [{}])
_NLI = {"premise": "It rains.", "hypothesis": "It is wet.", "idx": 7}
_WSC_TARGET = {"span1_text": "Ann", "span1_index": 0, "span2_text": "she", "span2_index": 2}
_ROWS: dict[str, tuple[str, object]] = {
    "boolq": ("BoolQ", {"question": "is it", "passage": "It is.", "idx": 7, "label": True}),
    "cb": ("CB", {**_NLI, "label": "neutral"}),
    "copa": (
        "COPA",
        {
            "premise": "A.",
            "choice1": "B.",
            "choice2": "C.",
            "question": "cause",
            "label": 1,
            "idx": 7,
        },
    ),
    "multirc": (
        "MultiRC",
        {
            "idx": 7,
            "passage": {
                "text": "A.",
                "questions": [
                    {"question": "B?", "idx": 1, "answers": [{"text": "C", "idx": 2, "label": 1}]}
                ],
            },
        },
    ),
    "record": (
        "ReCoRD",
        {
            "idx": 7,
            "passage": {"text": "Ann left.", "entities": [{"start": 0, "end": 2}]},
            "qas": [
                {
                    "query": "@placeholder left.",
                    "idx": 1,
                    "answers": [{"start": 0, "end": 2, "text": "Ann"}],
                }
            ],
        },
    ),
    "rte": ("RTE", {**_NLI, "label": "entailment"}),
    "wic": (
        "WiC",
        {"word": "a", "sentence1": "A a.", "sentence2": "B a.", "idx": 7, "label": False},
    ),
    "wsc": ("WSC", {"text": "Ann said she left.", "target": _WSC_TARGET, "idx": 7, "label": True}),
}


def _damaged(value: object) -> Iterator[object]:
    yield from _OTHERS
    if isinstance(value, dict):
        for name, inner in value.items():
            yield {key: kept for key, kept in value.items() if key != name}
            yield from ({**value, name: other} for other in _damaged(inner))
    if isinstance(value, list):
        for place, inner in enumerate(value):
            yield from ([*value[:place], other, *value[place + 1 :]] for other in _damaged(inner))


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("name", sorted(_ROWS))
def test_the_template_finds_its_texts_and_tells_choices_apart(
    name: str, form: Form, tmp_path: Path
) -> None:
    _, row = _ROWS[name]
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    (question,) = published_task(name).read_original(tmp_path, Split.TRAIN)
    template = template_of(name)
    assert template.asked(question, form)
    written = {template.written(choice, form) for choice in question.choices}
    assert len(written) == len(question.choices)


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("name", sorted(_ROWS))
def test_a_damaged_line_gives_questions_or_names_itself(
    name: str, split: Split, tmp_path: Path
) -> None:
    folder, row = _ROWS[name]
    task = published_task(name)
    file = {"train": "train", "validation": "val", "test": "test"}[split.value] + ".jsonl"
    path = tmp_path / folder / file
    path.parent.mkdir()
    path.write_text(json.dumps(row))
    (whole,) = task.read_original(tmp_path, split)
    refusals = []
    for damaged in _damaged(row):
        path.write_text(f"{json.dumps(row)}\n{json.dumps(damaged)}")
        try:
            questions = task.read_original(tmp_path, split)
        except DataError as error:
            refusals.append(str(error))
        else:
            assert questions[0] == whole
            assert all(set(question.answers) <= set(question.choices) for question in questions)
    assert len(refusals) > 40
    assert all(f"{file}:2: " in refusal for refusal in refusals)
    assert max(map(len, refusals)) < len(str(tmp_path)) + 300
