"""The timing table of FL-LLaMA (arXiv 2505.15683) with our figures beside theirs.

Theirs: LLaMA-2-7B, 1,000 ReCoRD rows, batch 1, p = q = 1, their hardware. Ours: a small random
Llama on this machine, batch 1, p = q = 1, scaled to 1,000 rows. Only factors over the own
sequential mode can be compared, and those of several replicas are divided by the number of
replicas, as they cost that many times the hardware. Both send one length per row instead of a mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.federation_sides import Case, Ours, Subject, unsplit
from benchmarks.report import print_table

__all__ = ["PUBLISHED_S", "TableRow", "client_batch_rows", "print_published_table"]

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


def client_batch_rows(
    ours: Ours, model: Subject, case: Case, threads: tuple[int, ...], counts: tuple[int, ...]
) -> list[TableRow]:
    """Measure sequential, client batch and centralised training.

    Args:
        ours: running server and clients.
        model: what they train.
        case: one row a step.
        threads: settings to try where a single process computes at a time.
        counts: numbers of clients in a client batch; the largest also trains in turn.
    """
    most = max(counts)
    sequential_s = min(ours.in_turn(case, count, most).median_s for count in threads) / most
    together_s = {f"client-batch {n}": ours.together(case, n).median_s / n for n in counts}
    central_s = min(unsplit(model, case, 1, n, case.steps).median_s for n in threads)
    measured_s = {"sequential": sequential_s, **together_s, "centralised": central_s}
    return [
        TableRow(name=name, ours_s=measured_s[name] * _ROWS if name in measured_s else None)
        for name in PUBLISHED_S
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
