"""What is made of log-likelihoods and scores."""

import json

import pytest

from cutlayer.evaluation.report import (
    Cost,
    Evaluation,
    Outcome,
    choice_outcome,
    predictions,
    summaries,
)
from cutlayer.evaluation.rows import TooLong

COST = Cost(
    num_tokens=100,
    num_new_tokens=8,
    seconds=2.0,
    bytes_up=5000,
    bytes_down=4000,
    num_vectors_released=90,
    num_vectors_replayed=10,
)


def outcome(where: str, **scores: float) -> Outcome:
    return Outcome(where=where, scores=scores, prediction={"kind": "generate", "reply": "müh"})


@pytest.mark.parametrize(
    ("log_likelihoods", "accuracy", "normalised"),
    [
        ([-4.0, -6.0], 1.0, 0.0),
        ([-6.0, -9.0], 1.0, 0.0),
        ([-3.0, -12.1], 1.0, 1.0),
        ([-8.0, -3.0], 0.0, 0.0),
        ([-3.0, -3.0], 1.0, 0.0),
        ([-3.0, -12.0], 1.0, 1.0),
    ],
)
def test_the_normalised_choice_is_by_character_and_the_first_of_equals_wins(
    log_likelihoods: list[float], accuracy: float, normalised: float
) -> None:
    found = choice_outcome("f:1", log_likelihoods, ["ab", "abcdefgh"], 0)
    assert found.scores == {"accuracy": accuracy, "accuracy_normalised": normalised}


def test_each_metric_is_averaged_over_the_items_that_have_it() -> None:
    found = summaries([outcome("f:1", f1=1.0), outcome("f:2", f1=0.0, rouge_l=0.25)])
    assert list(found) == ["f1", "rouge_l"]
    assert (found["f1"].mean, found["f1"].num_items) == (0.5, 2)
    assert (found["rouge_l"].mean, found["rouge_l"].num_items) == (0.25, 1)


def test_predictions_are_lines_in_the_order_of_the_file() -> None:
    lines = list(predictions([outcome("f:1", f1=1.0), choice_outcome("f:2", [-1, -2], "ab", 1)]))
    assert json.loads(lines[0]) == {
        "where": "f:1",
        "kind": "generate",
        "reply": "müh",
        "scores": {"f1": 1.0},
    }
    assert "müh".encode() in lines[0]
    assert json.loads(lines[1])["choice"] == 0
    assert all(line.endswith(b"\n") for line in lines)


def test_the_result_names_what_was_left_out_and_holds_no_reply() -> None:
    skipped = TooLong(where="f:3", num_tokens=9, context_length=8)
    result = Evaluation(
        outcomes=[outcome("f:1", f1=1.0)], skipped=[skipped], cost=COST, guarantee="none"
    )
    values = result.values()
    assert values["skipped"] == ["f:3: 9 tokens in a context of 8"]
    assert (values["num_items"], values["num_skipped"], values["tokens_per_s"]) == (1, 1, 50.0)
    assert "müh" not in json.dumps(values, ensure_ascii=False)
    assert "müh" not in repr(result)
