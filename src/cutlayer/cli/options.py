"""Options that several commands share. It parses nothing."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AddressOption",
    "AuthorityOption",
    "ConfigOption",
    "HostOption",
    "JsonOption",
    "KindOption",
    "PassphraseOption",
    "PublishOption",
    "SetOption",
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
