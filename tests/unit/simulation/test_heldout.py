"""Rows as questions: what counts as prompt, answer and choice, and scores token by token."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cutlayer import Client
from cutlayer.data.tasks import ChoiceTask
from cutlayer.data.template import Example
from cutlayer.errors import DataError
from cutlayer.simulation.heldout import answers_of, choice_tasks, held_out
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def client(model: Path, tmp_path: Path) -> Iterator[Client]:
    settings = client_settings(model, tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as opened,
    ):
        yield opened


def _row(prompt: list[int], answer: list[int], row_id: int = 0) -> Example:
    labels = [-100] * len(prompt) + answer + [-100]
    return Example([*prompt, *answer, 99], labels, row_id)


def test_what_follows_the_answer_belongs_to_no_question() -> None:
    rows = [_row([1, 2, 3], [7]), _row([4], [8, 9])]
    assert answers_of(rows) == ((7,), (8, 9))
    tasks = choice_tasks(rows, answers_of(rows))
    assert [(t.prompt, t.choices[t.answer]) for t in tasks] == [((1, 2, 3), (7,)), ((4,), (8, 9))]


def test_rows_that_are_no_multiple_choice_are_refused() -> None:
    with pytest.raises(DataError, match="have 1 different completions"):
        answers_of([_row([1], [7])])
    with pytest.raises(DataError, match="33 different completions; owners are compared by mul"):
        answers_of([_row([1], [token]) for token in range(100, 133)])
    with pytest.raises(DataError, match="row 5 does not end with one of the known answers"):
        choice_tasks([_row([1], [9], row_id=5)], ((7,), (8,)))
    with pytest.raises(DataError, match="row 0 has no scored token"):
        answers_of([Example([1, 2], [-100, -100], 0)])


def test_no_row_to_score_is_refused(client: Client) -> None:
    with pytest.raises(DataError, match="no held-out row to score"):
        held_out(client, [])


def test_answers_that_share_a_token_are_scored_by_likelihood(client: Client, model: Path) -> None:
    choices = ((7, 20), (7, 30), (9, 9))
    tasks = [ChoiceTask((1, 2, 3 + n), choices, n % 3) for n in range(6)] * 2
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for task in tasks:
            sums = []
            for choice in choices:
                log_probs = whole(torch.tensor([[*task.prompt, *choice]])).logits[0].log_softmax(1)
                start = len(task.prompt) - 1
                sums.append(sum(float(log_probs[start + n, t]) for n, t in enumerate(choice)))
            right += sums.index(max(sums)) == task.answer
            loss -= float(log_probs[len(task.prompt) - 1, choices[task.answer][0]])
    found = held_out(client, tasks)
    assert found.accuracy == pytest.approx(right / len(tasks))
    assert found.loss == pytest.approx(loss / len(tasks), 1e-4)
