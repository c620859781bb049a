"""The SPF benchmark: contestants share a model, and count what they hold."""

from pathlib import Path

import pytest
import torch

from benchmarks.spf import Sizes, compare
from benchmarks.spf_subject import DENSE, Contestant, load_model, make_task

_SIZES = Sizes(num_steps=3, rows_per_step=4, num_questions=8, lr=1e-3)


def test_all_of_the_rows_learn_what_dense_fine_tuning_learns(tmp_path: Path) -> None:
    task = make_task(None, 8, 8, tmp_path)
    quarter, whole, dense = compare(task, _SIZES, (0.25, 1.0, DENSE))
    assert whole.num_trainable == dense.num_trainable
    assert whole.optimizer_bytes == dense.optimizer_bytes == 8 * dense.num_trainable
    assert quarter.optimizer_bytes == 8 * quarter.num_trainable < 0.4 * dense.optimizer_bytes
    assert whole.losses == pytest.approx(dense.losses, rel=1e-5)
    assert quarter.losses[-1] < quarter.losses[0]
    assert len(quarter.step_s) == _SIZES.num_steps


def test_contestants_of_one_model_do_not_touch_each_other(tmp_path: Path) -> None:
    task = make_task(None, 8, 8, tmp_path)
    model = load_model(task.model)
    with torch.no_grad():
        before = model.loss(task.train).item()
    one, two = (Contestant(model, ratio, 1e-2) for ratio in (0.5, 0.125))
    one.use()
    one.step(task.train)
    two.use()
    assert two.step(task.train) == pytest.approx(before, rel=1e-6)
