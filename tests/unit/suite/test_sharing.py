"""Rows of owners, and those that meet in a step."""

from pathlib import Path

from cutlayer.data.batches import BatchPlan
from cutlayer.suite.sharing import rows_of_owners, steps_of, steps_of_owners
from cutlayer.suite.spec import Method
from tests.unit.suite.tiny_tasks import tiny_spec, tiny_task


def test_every_row_has_one_owner(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, Method.TOGETHER, owners=4)
    owned = rows_of_owners(spec, tiny_task(tmp_path / "task"))
    assert len(owned) == 4
    assert sorted(row for rows in owned for row in rows) == list(range(24))


def test_a_step_has_of_each_owner_what_its_own_plan_takes(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, Method.TOGETHER, owners=2, steps=5)
    owned = [[3, 1, 7, 9], [0, 2, 4, 6, 8, 5]]
    steps = steps_of_owners(spec, owned)
    assert len(steps) == 5
    plans = [
        BatchPlan(num_rows=len(rows), rows_per_step=4, seed=spec.seed, steps=5) for rows in owned
    ]
    for number, step in enumerate(steps):
        first, second = (
            [own[p] for p in plan.rows_of(number)] for own, plan in zip(owned, plans, strict=True)
        )
        assert step == (*first, *second)


def test_one_owner_keeps_its_own_order(tmp_path: Path) -> None:
    task = tiny_task(tmp_path / "task")
    alone = steps_of(tiny_spec(tmp_path, Method.CENTRALISED), task)
    four = steps_of(tiny_spec(tmp_path, Method.CENTRALISED, owners=4), task)
    assert {len(step) for step in four} == {8}
    assert alone != four
