"""A plan is a pure function of the step's number, and a batch is its rows, packed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.data.batches import BatchPlan, batch, shuffled
from cutlayer.data.template import Example
from cutlayer.errors import ConfigError

ROWS = [Example([7, 8, 9], [-100, 8, 9], 5), Example([1], [-100], 6), Example([3, 4], [-100, 4], 9)]


@given(
    num_rows=st.integers(1, 60), rows_per_step=st.integers(1, 20), seed=st.integers(0, 2**64 - 1)
)
def test_every_epoch_sees_every_row_once(num_rows: int, rows_per_step: int, seed: int) -> None:
    plan = BatchPlan(num_rows=num_rows, rows_per_step=rows_per_step, seed=seed, epochs=2)
    for epoch in range(2):
        steps = [s for s in range(plan.num_steps) if plan.epoch_of(s) == epoch]
        rows = [row for step in steps for row in plan.rows_of(step)]
        assert sorted(rows) == list(range(num_rows))


def test_a_resumed_plan_gives_the_same_rows_from_the_step_number_alone() -> None:
    whole = BatchPlan(num_rows=50, rows_per_step=8, seed=3, epochs=4)
    rows = [whole.rows_of(step) for step in range(whole.num_steps)]
    for step in reversed(range(whole.num_steps)):
        shuffled.cache_clear()
        assert BatchPlan(num_rows=50, rows_per_step=8, seed=3, epochs=4).rows_of(step) == rows[step]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = BatchPlan(num_rows=50, rows_per_step=50, seed=3, epochs=2)
    other = BatchPlan(num_rows=50, rows_per_step=50, seed=4, epochs=2)
    orders = [plan.rows_of(0), plan.rows_of(1), other.rows_of(0), other.rows_of(1)]
    assert len(set(orders)) == 4


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # Golden: a run that is resumed elsewhere must go on with the same rows.
    assert shuffled(8, 0, 1) == (5, 3, 7, 2, 4, 1, 0, 6)


def test_the_last_partial_step_is_kept_unless_told() -> None:
    kept = BatchPlan(num_rows=10, rows_per_step=4, epochs=1)
    dropped = BatchPlan(num_rows=10, rows_per_step=4, epochs=1, drop_last=True)
    assert [len(kept.rows_of(step)) for step in range(kept.num_steps)] == [4, 4, 2]
    assert [len(dropped.rows_of(step)) for step in range(dropped.num_steps)] == [4, 4]


def test_steps_may_end_within_an_epoch_and_run_over_several() -> None:
    plan = BatchPlan(num_rows=10, rows_per_step=4, steps=7)
    assert plan.num_steps == 7
    assert [plan.epoch_of(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    max_rows=st.none() | st.integers(1, 9),
    max_tokens=st.none() | st.integers(1, 90),
)
def test_micro_batches_keep_rows_order_and_limits(
    lengths: list[int], max_rows: int | None, max_tokens: int | None
) -> None:
    plan = BatchPlan(
        num_rows=len(lengths),
        rows_per_step=16,
        epochs=1,
        micro_batch_rows=max_rows,
        micro_batch_tokens=max_tokens,
        lengths=tuple(lengths),
    )
    for step in range(plan.num_steps):
        parts = plan.micro_batches(step)
        assert tuple(row for part in parts for row in part) == plan.rows_of(step)
        for part in parts:
            assert 1 <= len(part) <= (max_rows or 16)
            num_tokens = sum(lengths[row] for row in part)
            assert max_tokens is None or num_tokens <= max_tokens or len(part) == 1
        if max_rows is None and max_tokens is None:
            assert len(parts) == 1


def test_micro_batches_are_as_full_as_the_limits_allow() -> None:
    plan = BatchPlan(num_rows=9, rows_per_step=9, epochs=1, micro_batch_rows=4)
    assert [len(part) for part in plan.micro_batches(0)] == [4, 4, 1]
    plan = BatchPlan(
        num_rows=6, rows_per_step=6, epochs=1, micro_batch_tokens=20, lengths=(10,) * 6
    )
    assert [len(part) for part in plan.micro_batches(0)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_rows": 4, "rows_per_step": 2}, "set epochs or steps"),
        ({"num_rows": 4, "rows_per_step": 2, "epochs": 1, "steps": 1}, "set epochs or steps"),
        ({"num_rows": 0, "rows_per_step": 2, "epochs": 1}, "num_rows=0"),
        ({"num_rows": 4, "rows_per_step": 0, "epochs": 1}, "rows_per_step=0"),
        ({"num_rows": 4, "rows_per_step": 2, "epochs": 0}, "epochs=0"),
        ({"num_rows": 4, "rows_per_step": 2, "epochs": 1, "micro_batch_rows": 0}, "micro_batch"),
        ({"num_rows": 4, "rows_per_step": 2, "epochs": 1, "micro_batch_tokens": 9}, "length of"),
        ({"num_rows": 4, "rows_per_step": 8, "epochs": 1, "drop_last": True}, "exceeds the 4"),
        ({"num_rows": 4, "rows_per_step": 2, "epochs": 1, "seed": -1}, "seed=-1"),
    ],
)
def test_plans_that_cannot_be_are_refused(arguments: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        BatchPlan(**arguments)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_outside_the_plan_is_refused(step: int) -> None:
    with pytest.raises(ConfigError, match="not in this plan of 2 steps"):
        BatchPlan(num_rows=4, rows_per_step=2, epochs=1).rows_of(step)


def test_a_batch_packs_the_chosen_rows_with_their_labels() -> None:
    packed = batch(ROWS, [2, 0])
    assert packed.rows.lengths == (2, 3)
    assert packed.rows.tokens_N is not None
    assert packed.rows.tokens_N.tolist() == [3, 4, 7, 8, 9]
    assert packed.labels_N.tolist() == [-100, 4, -100, 8, 9]
    assert packed.labels_N.dtype is torch.int64
    assert packed.row_ids == (9, 5)
    assert packed.num_scored == 3
    assert "tensor" not in repr(packed)
