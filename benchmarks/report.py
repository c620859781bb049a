"""How a benchmark is called and how it answers: arguments, medians, a table, one JSON line.

It measures nothing.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

__all__ = ["Arguments", "emit", "median", "parse_arguments", "print_table", "spread"]

Value = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What every benchmark is told."""

    profile: str
    """`smoke`: seconds, a tiny random model; `standard`: minutes, the real model."""
    model: str | None
    """Folder, GGUF file or hub id; None is the profile's own."""
    as_json: bool
    """End with one JSON line."""
    threads: tuple[int, ...]
    """Thread settings to try on each side; the fastest is reported and named."""

    @property
    def is_smoke(self) -> bool:
        """The quick profile."""
        return self.profile == "smoke"


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> Arguments:
    """Read the command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--profile", choices=("smoke", "standard"), default="standard")
    parser.add_argument("--model", help="folder, GGUF file or hub id; default: the profile's own")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--threads", default="1,2", help="thread settings to try, as 1,2")
    found = parser.parse_args(arguments)
    return Arguments(
        profile=found.profile,
        model=found.model,
        as_json=found.json,
        threads=tuple(int(count) for count in found.threads.split(",")),
    )


def median(values: Sequence[float], *, skip: int = 0) -> float:
    """Median of what follows the first `skip` values, which only warmed up."""
    return statistics.median(values[skip:])


def spread(values: Sequence[float], *, skip: int = 0) -> str:
    """Median with the smallest and the largest value, to show how noisy the machine was."""
    kept = values[skip:]
    return f"{median(kept):.4g} ({min(kept):.4g} to {max(kept):.4g})"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> None:
    """Print one table; numbers are right-aligned and rounded to four digits."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        is_number = bool(rows) and isinstance(rows[0][number], int | float)
        table.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*map(_show, row))
    Console().print(table)


def emit(result: Mapping[str, Value], arguments: Arguments) -> None:
    """Print the result as a table of two columns, and as the last line in JSON if asked."""
    print_table("result", ("key", "value"), [(key, _show(value)) for key, value in result.items()])
    if arguments.as_json:
        print(json.dumps(dict(result), allow_nan=False), flush=True)


def _show(value: Value) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
