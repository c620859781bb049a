"""`cutlayer export`: the trained adapters as files that other software reads."""

from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output

__all__ = ["export"]

OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="PEFT adapter folder to write.")
]
MergeOption = Annotated[
    Path | None,
    typer.Option("--merge", metavar="FOLDER", help="Also write a whole model, adapter merged in."),
]
StepOption = Annotated[
    int | None,
    typer.Option("--step", help="A saved step; without it the best by validation, else the last."),
]


def export(
    config: ConfigOption,
    output: OutputOption,
    merge: MergeOption = None,
    step: StepOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Join head, trunk and tail adapters into one PEFT folder."""
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings
    from cutlayer.settings import load_settings

    out = Output(as_json)
    settings = load_settings(ClientSettings, config, set_ or ())
    warn_of_expiry(settings.connection, out)
    with Client(settings) as client:
        exported = client.export(output, step, merge)
    out.say(f"adapter of step {exported} written to {output}")
    if merge is not None:
        out.say(f"model with the adapter merged in written to {merge}")
    out.result({"step": exported, "output": str(output), "merged": merge and str(merge)})
