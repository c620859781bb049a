"""Predictions back as answers: none is taken for another question's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cutlayer.errors import DataError
from cutlayer.evaluation.published.predictions import predictions_of
from cutlayer.evaluation.published.question import Question
from cutlayer.evaluation.report import choice_outcome, predictions

TOPICS = [
    Question(key="t/1", choices=("sports", "tech"), answers=("tech",)),
    Question(key="t/2", choices=("sports", "tech"), answers=("sports",)),
]
TURN = Question(key="s/1", answers=("a cat", "dog"))


def _predicted(path: Path, scores: Sequence[Sequence[float]], right: Sequence[int]) -> Path:
    outcomes = [
        choice_outcome(f"test.jsonl:{line}", values, ("sports", "tech"), answer)
        for line, (values, answer) in enumerate(zip(scores, right, strict=True), 1)
    ]
    path.write_bytes(b"".join(predictions(outcomes)))
    return path


def _write(path: Path, *lines: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(dict(line)) + "\n" for line in lines))
    return path


def test_predictions_come_back_as_choices(tmp_path: Path) -> None:
    path = _predicted(tmp_path / "p.jsonl", [(-1.0, -2.0), (-3.0, -0.5)], right=(1, 0))
    found = predictions_of(path, TOPICS)
    assert [prediction.text for prediction in found] == ["sports", "tech"]
    assert found[0].log_likelihoods == (-1.0, -2.0)


def test_replies_come_back_as_text(tmp_path: Path) -> None:
    line = {"where": "test.jsonl:1", "kind": "generate", "reply": "cat"}
    path = _write(tmp_path / "p.jsonl", {**line, "scores": {"f1": 1.0, "own": 3.0}})
    assert predictions_of(path, [TURN])[0].text == "cat"
    unanswered = Question(key="s/2", answers=())
    assert predictions_of(path, [unanswered])[0].text == "cat"
    _write(path, {"where": "test.jsonl:1", "kind": "choice", "choice": 0})
    with pytest.raises(DataError, match="no reply"):
        predictions_of(path, [TURN])


def test_another_number_of_lines_is_refused(tmp_path: Path) -> None:
    path = _predicted(tmp_path / "p.jsonl", [(-1.0, -2.0)], right=(1,))
    with pytest.raises(DataError, match="1 predictions for 2 questions; score the task's whole"):
        predictions_of(path, TOPICS)


def test_another_order_is_refused(tmp_path: Path) -> None:
    path = _predicted(tmp_path / "p.jsonl", [(-1.0, -2.0), (-3.0, -0.5)], right=(1, 0))
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match="not about line 1"):
        predictions_of(path, TOPICS)


def test_lines_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = {"kind": "choice", "choice": 2, "log_likelihoods": [-1, -2, -3]}
    _write(path, {"where": "t:1", **line}, {"where": "t:2", **line})
    with pytest.raises(DataError, match="3 log-likelihoods for 2 choices"):
        predictions_of(path, TOPICS)
    _write(path, {"reply": "x"}, {"reply": "y"})
    with pytest.raises(DataError, match="no line of cutlayer eval --out"):
        predictions_of(path, TOPICS)


def test_lines_scored_with_other_right_answers_are_refused(tmp_path: Path) -> None:
    """Such as of the test file that stood in the folder before."""
    for right in ((1, 1), (1, 2), (-1, 0)):
        path = _predicted(tmp_path / "p.jsonl", [(-1.0, -2.0), (-3.0, -0.5)], right)
        with pytest.raises(DataError, match="its right choice is not the question's; these"):
            predictions_of(path, TOPICS)
    line = {"where": "test.jsonl:1", "kind": "generate", "reply": "cat", "scores": {"f1": 0.0}}
    with pytest.raises(DataError, match="the reply has another f1") as caught:
        predictions_of(_write(path, line), [TURN])
    assert "cat" not in str(caught.value)
