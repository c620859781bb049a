"""`cutlayer purge`: remove a run's state. What that means and does not mean is in `storage`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output, format_bytes

__all__ = ["purge"]

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
LedgerOption = Annotated[
    bool, typer.Option("--ledger", help="Remove the privacy ledger too: spent budget is forgotten.")
]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="The owner's storage key (run.key_file)."),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask on a terminal.")]


def purge(
    run: RunArgument,
    ledger: LedgerOption = False,
    key_file: KeyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove adapters, optimizer, released history and keys of a run; the ledger stays."""
    from cutlayer.storage.purge import purge_run
    from cutlayer.storage.vault import open_vault

    out = Output(as_json)
    if not yes and sys.stdin.isatty():
        typer.confirm(f"remove the state of {run}?", abort=True, err=True)
    owner = None if key_file is None else open_vault(key_file)
    done = purge_run(run, keep_ledgers=not ledger, owner=owner)
    out.say(f"{run}: removed {done.num_files} files, {format_bytes(done.num_bytes)}")
    if done.kept:
        out.say(f"kept: {', '.join(str(path) for path in done.kept)}")
    if not done.is_key_destroyed:
        out.say("the run was not encrypted: old copies on the disk may still be readable")
    out.result(
        {
            "run": str(run),
            "num_files": done.num_files,
            "num_bytes": done.num_bytes,
            "kept": [str(path) for path in done.kept],
            "is_key_destroyed": done.is_key_destroyed,
        }
    )
