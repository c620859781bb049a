"""The timing table of FL-LLaMA (arXiv 2505.15683) with our figures beside theirs.

Theirs: LLaMA-2-7B, 1,000 ReCoRD rows, batch 1, p = q = 1, their hardware. Ours: a small random
Llama on this machine, batch 1, p = q = 1, scaled to 1,000 rows. Only factors over the own
sequential mode can be compared, and those of several replicas are divided by the number of
replicas, as they cost that many times the hardware. Both send one length per row instead of a mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.federation_sides import Case, Ours, Subject, unsplit
from benchmarks.report import print_table

__all__ = [
    "PUBLISHED_S",
    "TableRow",
    "centralised_seconds",
    "client_batch_seconds",
    "hierarchical_seconds",
    "print_published_table",
    "sequential_seconds",
    "table_rows",
]

PUBLISHED_S = {
    "sequential": 689.0,
    "client-batch 2": 630.0,
    "client-batch 4": 542.0,
    "client-batch 8": 489.0,
    "server-hierarchical 2": 348.0,
    "server-hierarchical 4": 174.0,
    "server-hierarchical 8": 86.0,
    "centralised": 382.0,
}
"""Their seconds."""
_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One way to train, theirs and ours."""

    name: str
    """Key of `PUBLISHED_S`."""
    ours_s: float | None
    """Seconds for 1,000 rows; None where it was not measured."""

    @property
    def num_replicas(self) -> int:
        """Copies of the trunk that it takes."""
        return int(self.name.split()[1]) if self.name.startswith("server-hier") else 1


def sequential_seconds(ours: Ours, case: Case, threads: Sequence[int]) -> dict[str, float]:
    """Seconds a row of all clients in turn.

    Args:
        ours: running server and clients.
        case: one row a step.
        threads: of the clients, to try.
    """
    turns = [ours.in_turn(case, count) for count in threads]
    return {"sequential": min(one.median_s for one in turns) / ours.num_clients}


def client_batch_seconds(ours: Ours, case: Case, counts: Sequence[int]) -> dict[str, float]:
    """Seconds a row of each number of clients together."""
    return {f"client-batch {n}": ours.together(case, n).median_s / n for n in counts}


def centralised_seconds(model: Subject, case: Case, threads: Sequence[int]) -> dict[str, float]:
    """Seconds a row of unsplit PEFT with its fastest thread setting, one row a step as theirs."""
    plain = [unsplit(model, case, 1, count, case.steps) for count in threads]
    return {"centralised": min(one.median_s for one in plain)}


def hierarchical_seconds(ours: Ours, case: Case, num_replicas: int) -> dict[str, float]:
    """Seconds a row with as many replicas as clients, as theirs."""
    seconds = ours.together(case, num_replicas).median_s / num_replicas
    return {f"server-hierarchical {num_replicas}": seconds}


def table_rows(seconds_per_row: Mapping[str, float]) -> list[TableRow]:
    """Every row of their table; ours is empty where it was not measured."""
    return [
        TableRow(name=name, ours_s=None if seconds is None else seconds * _ROWS)
        for name, seconds in ((name, seconds_per_row.get(name)) for name in PUBLISHED_S)
    ]


def print_published_table(rows: list[TableRow], note: str) -> dict[str, float]:
    """Print the table; returns our factors over sequential per replica, by name."""
    ours_s = {row.name: row.ours_s for row in rows}
    factors = {row.name: _factor(ours_s, row) for row in rows}
    print_table(
        f"published comparison, seconds for 1,000 rows, batch 1; {note}",
        ("mode", "theirs s", "factor / replica", "ours s", "factor / replica", "replicas"),
        [
            (
                row.name,
                PUBLISHED_S[row.name],
                _factor(PUBLISHED_S, row),
                "not measured" if row.ours_s is None else row.ours_s,
                "" if (own := factors[row.name]) is None else own,
                row.num_replicas,
            )
            for row in rows
        ],
    )
    return {name: factor for name, factor in factors.items() if factor is not None}


def _factor(seconds: Mapping[str, float | None], row: TableRow) -> float | None:
    """How many times faster than sequential, for each copy of the trunk."""
    own_s, sequential_s = seconds[row.name], seconds["sequential"]
    if own_s is None or sequential_s is None:
        return None
    return sequential_s / own_s / row.num_replicas
