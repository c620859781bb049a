"""Options that several commands share. It parses nothing."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ConfigOption", "JsonOption", "SetOption"]

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", metavar="FILE", help="Settings in TOML form.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override one setting; may be repeated."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Make the last line of stdout one JSON object.")
]
