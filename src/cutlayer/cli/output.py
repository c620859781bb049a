"""What a command prints: text for people, or one JSON object as the last line of stdout.

It does not decide what is worth printing.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cutlayer.errors import ConfigError

__all__ = ["Output", "check_target", "format_bytes"]

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


class Output:
    """Text goes to stdout, or to stderr where stdout belongs to JSON; warnings always to stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for people."""
        self.console.print(text, markup=False)

    def stream(self, text: str) -> None:
        """A piece of text, shown at once and without a line end."""
        file = sys.stderr if self.as_json else sys.stdout
        file.write(text)
        file.flush()

    def warn(self, text: str) -> None:
        """A warning."""
        self.errors.print(Text(f"warning: {text}", style="yellow"))

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
    ) -> None:
        """A small table; cells ok, warn and fail are coloured."""
        table = Table(title=title, show_header=any(columns), title_justify="left")
        for column in columns:
            # A path that is cut off cannot be copied.
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        self.console.print(table)

    def result(self, values: Mapping[str, object]) -> None:
        """The command's result, printed in JSON form only."""
        if self.as_json:
            print(json.dumps(values, default=str), flush=True)


def check_target(file: Path, what: str) -> None:
    """Hours of work must not end at a folder that is not there.

    Args:
        file: to be written at the end.
        what: goes there.

    Raises:
        ConfigError: it cannot be a file, or its folder does not exist.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"cannot write {what} to {file}; name a file in a folder that exists")


def format_bytes(count: float) -> str:
    """A byte count for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
