"""`cutlayer provision group-key`: the key with which members hide their sum from the server.

It does not carry the key to the others: people do, and not through the server.
"""

from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output

__all__ = ["group_key"]


def group_key(
    file: Annotated[Path, typer.Argument(help="New file, mode 0600.")], as_json: JsonOption = False
) -> None:
    """One member: make the members' common key; it hides their sum from the server too."""
    from cutlayer.federation.secure.hidden import GroupKey

    out = Output(as_json)
    key = GroupKey.create(file)
    out.say(f"group key {file}: give it to every member, never to the server's operator")
    out.say(f"fingerprint {key.fingerprint}; members compare it by telephone")
    out.result({"group_key": str(file), "fingerprint": key.fingerprint})
