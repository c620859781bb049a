"""`cutlayer attest tpm`: show the owner once that a machine's quotes come from a genuine TPM.

Machine: request; owner: challenge; machine: answer; owner: accept. What passes is a key in the file
that a policy names as `roots.tpm`. It judges no quote (`attest verify`).
"""

from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Make a TPM's attestation key known to its owner.")

KeepOption = Annotated[
    Path, typer.Option("--keep", metavar="FILE", help="What the owner keeps to himself.")
]


@app.command("request")
def request(
    path: Annotated[Path, typer.Argument(metavar="REQUEST", help="File to write.")],
    ek_certificate: Annotated[
        Path | None,
        typer.Option("--ek-certificate", metavar="FILE", help="PEM: the TPM's, up to its maker."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """On the machine: write its TPM's public keys to a file for the owner."""
    import msgspec

    from cutlayer.storage.files import write_atomic
    from cutlayer.tee.attester import AttesterSettings
    from cutlayer.tee.tpm_activation import request_activation
    from cutlayer.tee.tpm_device import find_tpm
    from cutlayer.tee.tpm_keys import key_digest, parse_public

    out = Output(as_json)
    chain = b"" if ek_certificate is None else _read(ek_certificate)
    made = request_activation(find_tpm(AttesterSettings(source="tpm")), chain)
    write_atomic(path, msgspec.json.encode(made), mode=0o644)
    keys = {name: key_digest(parse_public(data).key) for name, data in _keys(made.ek, made.ak)}
    out.say(f"wrote {path}; send it to the owner (endorsement key {keys['ek_sha256']})")
    out.result({"request": str(path), **keys})


@app.command("challenge")
def challenge(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="Of the machine.")],
    path: Annotated[Path, typer.Argument(metavar="CHALLENGE", help="File to write.")],
    roots: Annotated[
        Path, typer.Option("--roots", metavar="FILE", help="PEM: TPM makers' roots, or known keys.")
    ],
    keep: KeepOption,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Time of the verdict; now if absent.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """At the owner: check the TPM's endorsement key, and wrap a secret for it."""
    import msgspec

    from cutlayer.cli.attest_input import time_of
    from cutlayer.errors import ConfigError
    from cutlayer.storage.files import write_atomic
    from cutlayer.tee.tpm_activation import ActivationRequest, begin_activation

    out = Output(as_json)
    try:
        asked = msgspec.json.decode(_read(request), type=ActivationRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{request} is no request of `attest tpm request`: {error}") from error
    made = begin_activation(asked, _read(roots), time_of(at))
    write_atomic(keep, msgspec.json.encode(made))
    write_atomic(path, made.credential, mode=0o644)
    out.say(f"wrote {path} for the machine; {keep} stays here")
    out.result({"challenge": str(path), "keep": str(keep)})


@app.command("answer")
def answer(
    challenge: Annotated[Path, typer.Argument(metavar="CHALLENGE", help="Of the owner.")],
    path: Annotated[Path, typer.Argument(metavar="ANSWER", help="File to write.")],
    as_json: JsonOption = False,
) -> None:
    """On the machine: let the TPM unwrap the owner's secret."""
    from cutlayer.storage.files import write_atomic
    from cutlayer.tee.attester import AttesterSettings
    from cutlayer.tee.tpm_device import find_tpm

    out = Output(as_json)
    device = find_tpm(AttesterSettings(source="tpm"))
    write_atomic(path, device.activate(_read(challenge)))
    out.say(f"wrote {path}; send it to the owner")
    out.result({"answer": str(path)})


@app.command("accept")
def accept(
    answer: Annotated[Path, typer.Argument(metavar="ANSWER", help="Of the machine.")],
    roots: Annotated[Path, typer.Argument(metavar="ROOTS", help="File of the policy's roots.tpm.")],
    keep: KeepOption,
    as_json: JsonOption = False,
) -> None:
    """At the owner: compare, and add the attestation key to the policy's file."""
    import msgspec

    from cutlayer.errors import ConfigError
    from cutlayer.storage.files import read_private, write_atomic
    from cutlayer.tee.tpm_activation import ActivationChallenge, finish_activation
    from cutlayer.tee.tpm_keys import key_digest, parse_public

    out = Output(as_json)
    try:
        kept = msgspec.json.decode(read_private(keep), type=ActivationChallenge)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{keep} was not written by `attest tpm challenge`: {error}") from error
    pem = finish_activation(kept, _read(answer))
    old = _read(roots) if roots.exists() else b""
    write_atomic(roots, old if pem in old else old + pem, mode=0o644)
    digest = key_digest(parse_public(kept.ak).key)
    out.say(f"added attestation key {digest} to {roots}")
    out.result({"roots": str(roots), "ak_sha256": digest})


def _keys(ek: bytes, ak: bytes) -> list[tuple[str, bytes]]:
    return [("ek_sha256", ek), ("ak_sha256", ak)]


def _read(path: Path) -> bytes:
    from cutlayer.errors import ConfigError

    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
