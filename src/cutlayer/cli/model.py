"""`cutlayer model`: seal private weights and adapters, release their keys, sign consents.

What is sealed and how is in `tee.private_model`; here are only the questions and answers.
"""

from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.model_consent import check_consent, consent, owner_key
from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output
from cutlayer.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(help="Private weights and adapters: seal, release to attested places, consent.")
app.command("owner-key")(owner_key)
app.command("consent")(consent)
app.command("check-consent")(check_consent)

KeysOption = Annotated[
    Path, typer.Option("--keys", metavar="FOLDER", help="Private folder with the owner's keys.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Sealed folder to write.")]
SealedArgument = Annotated[Path, typer.Argument(metavar="SEALED", help="A sealed folder.")]


@app.command("seal")
def seal(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, GGUF file or hub id.")],
    out_folder: OutOption,
    lower: Annotated[int, typer.Option("--lower", help="First block of the trunk.")],
    upper: Annotated[int, typer.Option("--upper", help="Block after the trunk's last.")],
    part: Annotated[str, typer.Option("--part", help="head, trunk or tail.")] = "trunk",
    keys: KeysOption = Path("model-keys"),
    as_json: JsonOption = False,
) -> None:
    """Write one part of a model, encrypted under a fresh key of its own."""
    from cutlayer.model.folder import resolve_model
    from cutlayer.model.partition import Cut, Part
    from cutlayer.tee.private_model.key_holder import KeyFolder
    from cutlayer.tee.private_model.sealed_part import seal_part

    if part not in set(Part):
        raise ConfigError(f"--part {part} is none; choose head, trunk or tail")
    holder = KeyFolder(keys)
    key = holder.new_key()
    label = seal_part(resolve_model(model), Cut(lower, upper), Part(part), out_folder, key)
    path = holder.keep(label, key)
    _say_sealed(Output(as_json), label.digest, out_folder, path)


@app.command("seal-adapter")
def seal_exported_adapter(
    adapter: Annotated[Path, typer.Argument(metavar="FOLDER", help="Written by export.")],
    out_folder: OutOption,
    keys: KeysOption = Path("model-keys"),
    as_json: JsonOption = False,
) -> None:
    """Write an exported adapter, encrypted under a fresh key of its own."""
    from cutlayer.tee.private_model.key_holder import KeyFolder
    from cutlayer.tee.private_model.sealed_adapter import read_adapter_files, seal_adapter

    holder = KeyFolder(keys)
    key = holder.new_key()
    label = seal_adapter(read_adapter_files(adapter), out_folder, key)
    path = holder.keep(label, key)
    _say_sealed(Output(as_json), label.digest, out_folder, path)


@app.command("inspect")
def inspect(sealed: SealedArgument, as_json: JsonOption = False) -> None:
    """Show what a sealed folder says of itself; no key is needed."""
    import msgspec

    from cutlayer.tee.private_model.label import read_label

    out = Output(as_json)
    label = read_label(sealed)
    table: dict[str, object] = msgspec.to_builtins(label) | {"digest": label.digest}
    out.table(("field", "value"), [(name, str(value)) for name, value in table.items()])
    out.result(table)


@app.command("release")
def release(
    sealed: SealedArgument,
    policy: Annotated[
        Path, typer.Option("--policy", metavar="FILE", help="Which places may have the key.")
    ],
    exchange: Annotated[
        Path, typer.Option("--exchange", metavar="FOLDER", help="Shared with the place.")
    ],
    keys: KeysOption = Path("model-keys"),
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 300.0,
    as_json: JsonOption = False,
) -> None:
    """Challenge a place through a shared folder and, if the policy accepts it, give it the key."""
    from cutlayer.tee.policy import read_policy
    from cutlayer.tee.private_model.exchange import hand_out
    from cutlayer.tee.private_model.key_holder import KeyFolder, KeyHolder
    from cutlayer.tee.private_model.label import read_label

    out = Output(as_json)
    label, accepted = read_label(sealed), read_policy(policy)
    holder = KeyHolder(KeyFolder(keys), accepted)
    out.say(f"waiting for the proof of a place in {exchange}")
    hand_out(holder, label, exchange, timeout_s)
    out.say(
        f"the key of {label.digest[:12]} was sealed to a place that policy {accepted.name} accepts "
        f"(least assurance {accepted.least.label})"
    )
    out.result({"digest": label.digest, "policy": accepted.name, "assurance": accepted.least.label})


def _say_sealed(out: Output, digest: str, folder: Path, key: Path) -> None:
    out.say(f"sealed in {folder}")
    out.say(f"its key is {key}: keep a copy, without it nothing can be opened again")
    out.result({"digest": digest, "sealed": str(folder), "key": str(key)})
