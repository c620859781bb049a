"""Which training rows belong to which owner, and which meet in a step. It writes nothing."""

from cutlayer.data.batches import BatchPlan
from cutlayer.data.partition import PartitionSettings, partition
from cutlayer.data.sources import read_records
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.settings import parse_settings
from cutlayer.suite.recipe import batch_plan
from cutlayer.suite.spec import RunSpec

__all__ = ["LABEL", "rows_of_owners", "steps_of", "steps_of_owners"]

LABEL = "label"
"""Column by which skewed owners differ."""


def rows_of_owners(spec: RunSpec, task: TaskFolder) -> list[list[int]]:
    """Every row to one owner: dealt out like cards, or with labels drawn by `spec.alpha`.

    Raises:
        DataError: an owner would have too few rows.
    """
    rule = PartitionSettings()
    if spec.alpha is not None:
        table = {"kind": "dirichlet", "alpha": spec.alpha, "column": LABEL}
        rule = parse_settings(PartitionSettings, table, f"run {spec.run_id}")
    keys = [str(record.value(LABEL)) for record in read_records(task.train, "jsonl")]
    return partition(keys, spec.owners, rule, spec.seed)


def steps_of(spec: RunSpec, task: TaskFolder) -> list[tuple[int, ...]]:
    """Rows of every optimizer step: one owner's own order, or those that several bring together.

    Raises:
        DataError: an owner would have too few rows.
    """
    if spec.owners > 1:
        return steps_of_owners(spec, rows_of_owners(spec, task))
    num_rows = sum(1 for _ in read_records(task.train, "jsonl"))
    plan = batch_plan(spec, num_rows)
    return [plan.rows_of(step) for step in range(plan.num_steps)]


def steps_of_owners(spec: RunSpec, owned: list[list[int]]) -> list[tuple[int, ...]]:
    """What a federation that pools every step computes on, owner after owner.

    Args:
        spec: its step's rows are shared out evenly.
        owned: rows of each owner, in the order of its file.
    """
    sizes = spec.sizes
    plans = [
        BatchPlan(
            num_rows=len(rows),
            rows_per_step=min(sizes.rows_per_step // spec.owners, len(rows)),
            seed=spec.seed,
            steps=sizes.steps,
        )
        for rows in owned
    ]
    return [
        tuple(
            rows[place]
            for rows, plan in zip(owned, plans, strict=True)
            for place in plan.rows_of(step)
        )
        for step in range(sizes.steps)
    ]
