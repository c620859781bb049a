"""`cutlayer model owner-key`, `consent` and `check-consent`: an owner's signed word.

The statement, its signature and its check are in `tee.private_model.consent`.
"""

from datetime import UTC, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.tee.private_model.label import What

__all__ = ["check_consent", "consent", "owner_key"]

ModelOption = Annotated[
    str, typer.Option("--model", metavar="DIGEST", help="The model's digest, 64 hex digits.")
]
WhatOption = Annotated[str, typer.Option("--what", help="adapter or weights.")]
ToOption = Annotated[str, typer.Option("--to", metavar="NAME", help="Name in a certificate.")]


def owner_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Private key to write.")],
    as_json: JsonOption = False,
) -> None:
    """Make the key by which an owner signs consents."""
    from cutlayer.tee.private_model.consent import new_owner_key

    out = Output(as_json)
    public = new_owner_key(file)
    out.say(f"private key {file}: whoever has it can give consents")
    out.say(f"public key {public}: for whoever checks them")
    out.result({"private": str(file), "public": str(public)})


def consent(
    output: Annotated[Path, typer.Argument(metavar="FILE", help="Consent to write.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The owner's private key.")],
    model: ModelOption,
    to: ToOption,
    until: Annotated[str, typer.Option("--until", help="Day, or time with zone, not after.")],
    what: WhatOption = "adapter",
    as_json: JsonOption = False,
) -> None:
    """Sign that somebody may take a private adapter or private weights out."""
    from cutlayer.storage.files import write_atomic
    from cutlayer.tee.private_model.consent import give_consent

    out = Output(as_json)
    end = _time(until, "--until", time.max)
    data = give_consent(key, _digest(model), _what(what), to, end)
    write_atomic(output, data, mode=0o644)
    out.say(f"{output}: {to} may take the {what} of model {model[:12]} out until {end:%F %T} UTC")
    out.result({"consent": str(output), "to": to, "what": what, "until": end.isoformat()})


def check_consent(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The consent.")],
    owner: Annotated[Path, typer.Option("--owner", metavar="FILE", help="The public key.")],
    model: ModelOption,
    to: ToOption,
    what: WhatOption = "adapter",
    at: Annotated[str | None, typer.Option("--at", help="Time with zone; default now.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a consent is the owner's and covers an export."""
    from cutlayer.tee.private_model import consent as room

    out = Output(as_json)
    found = room.read_consent(file, room.OwnerKey(owner))
    when = datetime.now(UTC) if at is None else _time(at, "--at", time.min)
    room.check_consent(found, _digest(model), _what(what), to, when)
    out.say(f"the owner consents until {found.until.astimezone(UTC):%F %T} UTC ({found.serial})")
    out.result({"serial": found.serial, "until": found.until.isoformat()})


def _what(name: str) -> "What":
    from cutlayer.tee.private_model.label import What

    if name not in set(What):
        raise ConfigError(f"--what {name} is none; choose adapter or weights")
    return What(name)


def _digest(text: str) -> str:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ConfigError(
            f"--model {text[:80]!r} is no digest; `cutlayer assets manifest FOLDER` prints it"
        )
    return digest.hex()


def _time(text: str, option: str, of_day: time) -> datetime:
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} {text!r} is no time; write 2026-12-31 or add T18:00Z"
        ) from error
    if len(text) == 10:
        return datetime.combine(parsed, of_day.replace(microsecond=0), UTC)
    if parsed.tzinfo is None:
        raise ConfigError(f"{option} {text} has no time zone; end it with Z or +00:00")
    return parsed.astimezone(UTC)
