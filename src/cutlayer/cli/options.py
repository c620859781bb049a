"""Options that several commands share. It parses nothing."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AdapterOption",
    "AddressOption",
    "AuthorityOption",
    "ConfigOption",
    "HostOption",
    "JsonOption",
    "KindOption",
    "MergeOption",
    "PassphraseOption",
    "PromptArgument",
    "PromptFileOption",
    "PublishOption",
    "SetOption",
    "StepOption",
    "TraceOption",
]

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
AuthorityOption = Annotated[
    Path, typer.Option("--authority", metavar="FOLDER", help="The owner's folder (see init).")
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase-file", metavar="FILE", help="Its first line unlocks the key."),
]
HostOption = Annotated[
    list[str] | None, typer.Option("--host", help="DNS name or IP of a server; repeat.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="Trunk server's address.")
]
PublishOption = Annotated[
    list[Path] | None,
    typer.Option("--publish", metavar="FILE", help="Write the revocation list here too; repeat."),
]
KindOption = Annotated[str, typer.Option("--kind", help="client or server.")]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        "--trace", metavar="FILE", help="Write a timeline (Chrome trace; Perfetto opens it)."
    ),
]
PromptArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")
]
PromptFileOption = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="One prompt per line; - is stdin.")
]
AdapterOption = Annotated[
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
