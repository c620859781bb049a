"""`cutlayer provision`: keys and certificates, for one machine in one go or step by step.

What is approved and how it is signed is in `identity`; here are only the questions and answers.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.group_key import group_key
from cutlayer.cli.options import (
    AddressOption,
    AuthorityOption,
    HostOption,
    JsonOption,
    KindOption,
    PassphraseOption,
    PublishOption,
)
from cutlayer.cli.output import Output
from cutlayer.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from cutlayer.identity.certificates import MemberKind
    from cutlayer.identity.revocation import Reason

__all__ = ["app"]

app = typer.Typer(help="Keys and certificates: request, approve, install, renew, revoke.")
app.command("group-key")(group_key)

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A member's folder.")]


@app.callback(invoke_without_command=True)
def provision(
    ctx: typer.Context,
    is_local: Annotated[
        bool, typer.Option("--local", help="Authority, server and clients on this machine.")
    ] = False,
    folder: Annotated[Path, typer.Option("--folder", help="Where --local puts them.")] = Path(
        "keys"
    ),
    names: Annotated[list[str] | None, typer.Option("--name", help="A client; repeat.")] = None,
    hosts: HostOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keys and certificates of a federation's members."""
    if ctx.invoked_subcommand is not None:
        if is_local:
            raise ConfigError("--local does everything in one go; leave the subcommand out")
        return
    if not is_local:
        raise ConfigError("say what to do: --local, or a subcommand (`cutlayer provision --help`)")
    _local(folder, names or ["client"], hosts, address, Output(as_json))


def _local(
    folder: Path, names: list[str], hosts: list[str] | None, address: str | None, out: Output
) -> None:
    from cutlayer.identity.provision import LOCAL_HOSTS, local

    made = local(folder, names, hosts or LOCAL_HOSTS, address)
    out.say(f"authority {made.authority}: whoever can read it can be anybody in this federation")
    out.say(f"server    {made.server}")
    for path in made.clients.values():
        out.say(f"client    {path}")
    out.result(
        {
            "authority": str(made.authority),
            "server": _files(made.server),
            "clients": {name: _files(path) for name, path in made.clients.items()},
        }
    )


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="New folder of the federation's owner.")],
    name: Annotated[str, typer.Option("--name", help="Of the federation.")],
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Owner: make the federation's authority."""
    from cutlayer.identity.provision import init_authority

    out = Output(as_json)
    made = init_authority(folder, name, _passphrase(passphrase_file))
    out.say(f"authority {folder}; back it up, it cannot be made again")
    out.say(f"fingerprint {made.fingerprint}; read it out to every participant")
    out.result({"authority": str(folder), "fingerprint": made.fingerprint})


@app.command("request")
def request(
    folder: FolderArgument,
    name: Annotated[str, typer.Option("--name", help="Wanted name in the federation.")],
    kind: KindOption = "client",
    hosts: HostOption = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="Use this private key, where it is.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Participant: make a private key, which stays, and a signing request to send."""
    from cutlayer.identity import provision as identity

    out = Output(as_json)
    asked = identity.request(folder, name, _kind(kind), hosts or (), key_file)
    out.say(f"send {asked.path} to the federation's owner")
    out.say(f"fingerprint {asked.fingerprint}; read it out to the owner by telephone")
    out.result({"request": str(asked.path), "fingerprint": asked.fingerprint})


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A request or a kit.")], as_json: JsonOption = False
) -> None:
    """What a request asks for, or what a kit grants, with its fingerprint."""
    from cutlayer.identity.provision import show_kit, show_request

    out = Output(as_json)
    values: dict[str, object]
    if file.suffix == ".csr":
        asked = show_request(file)
        values = {
            "name": asked.name,
            "kind": str(asked.kind),
            "hosts": list(asked.hosts),
            "fingerprint": asked.fingerprint,
        }
    else:
        note = show_kit(file)
        values = {
            "name": note.name,
            "kind": str(note.kind),
            "roles": list(note.roles),
            "hosts": list(note.hosts),
            "server_address": note.server_address,
            "not_after": note.not_after,
            "fingerprint": note.key_fingerprint,
            "authority_fingerprint": note.authority_fingerprint,
        }
    for key, value in values.items():
        out.say(f"{key:22}{', '.join(value) if isinstance(value, list) else value}")
    out.result(values)


@app.command("approve")
def approve(
    request_file: Annotated[Path, typer.Argument(metavar="REQUEST")],
    authority: AuthorityOption,
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="As the participant read it out.")
    ],
    roles: Annotated[
        list[str] | None,
        typer.Option("--role", help="train, generate, administer; serve. Default: by kind."),
    ] = None,
    days: Annotated[int, typer.Option("--days", help="Validity.")] = 365,
    replaces: Annotated[
        bool, typer.Option("--replaces", help="A new key of a member that is known already.")
    ] = False,
    address: AddressOption = None,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Owner: grant a request; writes the signed kit to send back."""
    from cutlayer.identity.certificates import MemberKind
    from cutlayer.identity.provision import approve as grant
    from cutlayer.identity.provision import open_authority, show_request

    out = Output(as_json)
    owner = open_authority(authority, _passphrase(passphrase_file))
    is_server = show_request(request_file).kind is MemberKind.SERVER
    granted = roles or (["serve"] if is_server else ["train", "generate"])
    kit = grant(
        owner,
        request_file,
        granted,
        days,
        fingerprint=fingerprint,
        server_address=address,
        replaces=replaces,
    )
    out.say(f"send {kit} back; it holds no secret")
    out.say(f"authority's fingerprint {owner.fingerprint}; read it out to the participant")
    out.result({"kit": str(kit), "roles": granted, "authority_fingerprint": owner.fingerprint})


@app.command("install")
def install(
    kit: Annotated[Path, typer.Argument(help="Zip file or folder from the owner.")],
    folder: FolderArgument,
    fingerprint: Annotated[
        str | None, typer.Option("--fingerprint", help="The authority's, as the owner read it out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Participant: verify a kit and put it into place."""
    from cutlayer.identity import provision as identity

    out = Output(as_json)
    note = identity.install(kit, folder, fingerprint)
    out.say(f"{folder}: {note.name}, {note.kind} with roles {', '.join(note.roles)}")
    out.say(f"valid until {note.not_after}")
    out.result({"name": note.name, "roles": list(note.roles), "not_after": note.not_after})


@app.command("renew")
def renew(
    folder: FolderArgument,
    is_new: Annotated[bool, typer.Option("--new-key", help="With a new private key.")] = False,
    hosts: HostOption = None,
    as_json: JsonOption = False,
) -> None:
    """Participant: request a new certificate; the installed one stays in use until then."""
    from cutlayer.identity import provision as identity

    out = Output(as_json)
    asked = identity.renew(folder, is_new, hosts or None)
    out.say(f"send {asked.path} to the federation's owner")
    out.say(f"fingerprint {asked.fingerprint}")
    out.result({"request": str(asked.path), "fingerprint": asked.fingerprint})


@app.command("revoke")
def revoke(
    who: Annotated[str, typer.Argument(help="A member's name, or serial:HEX.")],
    authority: AuthorityOption,
    reason: Annotated[str, typer.Option("--reason", help="As X.509 names it.")] = "unspecified",
    publish: PublishOption = None,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Owner: revoke certificates; servers that get the new list close their connections."""
    from cutlayer.identity.provision import open_authority
    from cutlayer.identity.provision import revoke as revoke_member

    out = Output(as_json)
    owner = open_authority(authority, _passphrase(passphrase_file))
    serials = revoke_member(owner, _member(who), _reason(reason), publish or ())
    written = [authority / "revoked.pem", *(publish or ())]
    out.say(f"revoked {len(serials)} certificate(s) of {who}")
    out.say(f"new list: {', '.join(str(path) for path in written)}; send it to every member")
    out.result({"serials": [f"{s:x}" for s in serials], "lists": [str(path) for path in written]})


@app.command("publish")
def publish(
    authority: AuthorityOption,
    files: PublishOption = None,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Owner: sign the revocation list again; do it within 30 days."""
    from cutlayer.identity.provision import open_authority, publish_list

    out = Output(as_json)
    owner = open_authority(authority, _passphrase(passphrase_file))
    number = publish_list(owner, files or ())
    out.say(f"revocation list {number}: {authority / 'revoked.pem'}")
    out.result({"number": number, "list": str(authority / "revoked.pem")})


@app.command("update")
def update(
    list_file: Annotated[Path, typer.Argument(metavar="LIST", help="List from the owner.")],
    folder: FolderArgument,
    as_json: JsonOption = False,
) -> None:
    """Participant: put a newer revocation list into place; a running server sees it at once."""
    from cutlayer.identity.provision import install_revocations

    out = Output(as_json)
    newer = install_revocations(list_file, folder)
    out.say(f"{folder}: revocation list {newer.number}, {len(newer.serials)} revoked")
    out.result({"number": newer.number, "num_revoked": len(newer.serials)})


@app.command("check")
def check(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Participant: everything that is wrong with a member's files, or soon will be."""
    from cutlayer.identity.provision import check_kit

    out = Output(as_json)
    found = check_kit(folder, datetime.now(UTC))
    for finding in found:
        out.say(f"{'fail' if finding.is_error else 'warn'}: {finding.text}")
    if not found:
        out.say(f"{folder} is in order")
    is_ok = not any(finding.is_error for finding in found)
    findings = [{"is_error": f.is_error, "path": str(f.path), "text": f.text} for f in found]
    out.result({"ok": is_ok, "findings": findings})
    if not is_ok:
        raise typer.Exit(2)


def _files(folder: Path) -> dict[str, str]:
    from cutlayer.identity.provision import member_files

    files = member_files(folder)
    names = ("certificate", "key", "authority", "revoked")
    return {"folder": str(folder), **{name: str(getattr(files, name)) for name in names}}


def _passphrase(file: Path | None) -> bytes | None:
    if file is None:
        return None
    from cutlayer.storage.files import read_private

    line = read_private(file).split(b"\n", 1)[0].rstrip(b"\r")
    if not line:
        raise StorageError(f"{file} has no passphrase in its first line")
    return line


def _kind(text: str) -> "MemberKind":
    from cutlayer.identity.certificates import MemberKind

    try:
        return MemberKind(text)
    except ValueError as error:
        raise ConfigError(f"--kind {text!r}: choose {' or '.join(MemberKind)}") from error


def _reason(text: str) -> "Reason":
    from cutlayer.identity.revocation import Reason

    try:
        return Reason(text)
    except ValueError as error:
        raise ConfigError(f"--reason {text!r}: choose {', '.join(Reason)}") from error


def _member(who: str) -> str | int:
    """A name, or a serial number in hex after `serial:`."""
    if not who.startswith("serial:"):
        return who
    try:
        return int(who.removeprefix("serial:"), 16)
    except ValueError as error:
        raise ConfigError(f"{who!r} is no serial number; write serial: and hex digits") from error
