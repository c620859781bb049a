"""Scores computed by hand for a model whose logits are a function of the last tokens."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cutlayer.data.batches import Batch
from cutlayer.data.tasks import ChoiceTask, Scoring, accuracy, mean_loss, predict
from cutlayer.data.template import Example
from cutlayer.errors import DataError

VOCAB = 8


class TableModel:
    """Next-token probabilities by last token; counts its rows."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        self._table = table
        self.calls: list[int] = []

    def score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        self.calls.append(len(rows))
        logits_BV = torch.full((len(rows), VOCAB), math.log(1e-4))
        for place, row in enumerate(rows):
            for token, probability in self._table[row[-1]].items():
                logits_BV[place, token] = math.log(probability)
        return logits_BV


def test_first_token_scoring_takes_the_best_answer_in_one_forward_per_row() -> None:
    model = TableModel({1: {3: 0.6, 4: 0.3}, 2: {3: 0.1, 4: 0.7, 5: 0.2}})
    tasks = [ChoiceTask((1,), ((3,), (4,)), 0), ChoiceTask((0, 2), ((3,), (4,)), 0)] * 5
    predictions = predict(tasks, model.score, rows_per_call=4)
    assert predictions == [0, 1] * 5
    assert accuracy(tasks, predictions) == 0.5
    assert model.calls == [4, 4, 2]


def test_likelihood_sums_all_tokens_and_shares_beginnings() -> None:
    # First tokens favour choice 0 (0.6 > 0.3), whole answers choice 1 (0.6 * 0.1 < 0.3 * 0.9).
    model = TableModel({1: {3: 0.6, 4: 0.3}, 3: {5: 0.1, 6: 0.9}, 4: {6: 0.9, 5: 0.1}})
    task = ChoiceTask((1,), ((3, 5), (4, 6)), 1)
    assert predict([task], model.score) == [0]
    assert predict([task], model.score, Scoring.LIKELIHOOD) == [1]
    assert sum(model.calls) == 1 + 3  # the beginnings (), (3), (4)


def test_likelihood_tells_answers_apart_that_begin_alike() -> None:
    model = TableModel({1: {3: 0.9}, 3: {5: 0.2, 6: 0.8}})
    task = ChoiceTask((1,), ((3, 5), (3, 6)), 1)
    with pytest.raises(DataError, match="begin with the same token; score by likelihood"):
        predict([task], model.score)
    assert predict([task], model.score, Scoring.LIKELIHOOD) == [1]


@pytest.mark.parametrize(
    ("prompt", "choices", "answer"),
    [
        ((), ((1,), (2,)), 0),
        ((1,), ((1,),), 0),
        ((1,), ((1,), ()), 0),
        ((1,), ((1,), (2,)), 2),
        ((1,), ((1,), (2,)), -1),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused(
    prompt: tuple[int, ...], choices: tuple[tuple[int, ...], ...], answer: int
) -> None:
    with pytest.raises(DataError):
        ChoiceTask(prompt, choices, answer)


def test_accuracy_of_nothing_is_an_error_and_counts_must_agree() -> None:
    with pytest.raises(DataError, match="no task"):
        accuracy([], [])
    with pytest.raises(ValueError, match="shorter"):
        accuracy([ChoiceTask((1,), ((1,), (2,)), 0)], [])


def test_mean_loss_weighs_tokens_not_rows() -> None:
    short = Example([1, 2], [-100, 2], 0)
    long = Example([1, 2, 3, 4], [-100, 2, 3, 4], 1)

    def loss_sum(rows: Batch) -> float:
        # 4 nats for the token of the short row, 1 for each of the long one.
        return sum({0: 4.0, 1: 3.0}[row_id] for row_id in rows.row_ids)

    for rows_per_call in (1, 2):
        report = mean_loss([short, long], loss_sum, rows_per_call)
        assert report.num_tokens == 4
        assert report.loss == pytest.approx(7 / 4)
        assert report.perplexity == pytest.approx(math.exp(7 / 4))


def test_a_loss_beyond_all_floats_has_infinite_perplexity() -> None:
    report = mean_loss([Example([1, 2], [-100, 2], 0)], lambda rows: 1e4)
    assert report.perplexity == math.inf


def test_mean_loss_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no validation row"):
        mean_loss([], lambda rows: 0.0)
