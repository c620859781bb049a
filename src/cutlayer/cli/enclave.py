"""`cutlayer enclave`: later blocks, their adapters and the LM head in an attested place.

`serve` runs that place; `train`, `generate` and `export` are its owners'. The work is in `enclave`.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output, format_bytes
from cutlayer.cli.work import stop_on_sigterm

if TYPE_CHECKING:
    from cutlayer.cli.progress import TrainingProgress
    from cutlayer.client.run_state import Progress
    from cutlayer.enclave.owner import EnclaveClient
    from cutlayer.enclave.server import EnclaveServer
    from cutlayer.enclave.settings import EnclaveSettings
    from cutlayer.tee.process.confine import Confinement

__all__ = ["app", "export", "generate", "serve", "train"]

app = typer.Typer(
    name="enclave",
    no_args_is_help=True,
    help="Later blocks in an attested place (docs/enclave.md).",
)

PromptArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue.")
]
FileOption = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="One prompt per line; - is stdin.")
]
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


@app.command()
def serve(config: ConfigOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Run an enclave; SIGTERM and SIGINT let calls in flight finish, then stop it."""
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.enclave.server import EnclaveServer, prepare_state
    from cutlayer.enclave.settings import EnclaveSettings
    from cutlayer.settings import load_settings

    out = Output(as_json)
    settings = load_settings(EnclaveSettings, config, set_ or ())
    warn_of_expiry(settings.listen, out)
    if prepare_state(settings):
        out.warn(
            f"{settings.state.key_file} was made; keep it where this machine's host cannot read, "
            "or let owners release keys of their own (tee.adapter_key_file)"
        )
    is_early = _confine_files(settings, config)
    began_s = time.monotonic()
    server = EnclaveServer(settings)
    try:
        server.start()
        _announce(server, settings, _confined(settings, is_early), out)
        stop_on_sigterm()
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        out.say("draining: calls in flight finish, new ones are refused")
    finally:
        server.stop()
    out.say("stopped")
    out.result({"event": "stopped", "uptime_s": round(time.monotonic() - began_s, 3)})


@app.command()
def train(config: ConfigOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Fine-tune what is inside; started again, it goes on from the newest common step.

    With a section [rounds] it trains together with other owners, until the rounds end.
    """
    from cutlayer.cli.progress import TrainingProgress

    out = Output(as_json)
    with _open(config, set_, out) as owner:
        with TrainingProgress(owner) as shown:
            progress = owner.train(shown.show)
        result = _result(owner, progress, shown)
    _print(result, out)
    out.result(result)


@app.command()
def generate(
    config: ConfigOption,
    prompt: PromptArgument = None,
    file: FileOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue texts; without PROMPT and --file, all of stdin is one prompt."""
    from cutlayer.cli.generate import read_prompts

    out = Output(as_json)
    prompts = read_prompts(prompt or [], file)
    with _open(config, set_, out) as owner:
        replies = _reply(owner, prompts, out)
        pairs = zip(prompts, replies, strict=True)
        out.result(
            {
                "replies": [{"prompt": asked, "reply": reply} for asked, reply in pairs],
                "bytes_up": owner.enclave.bytes_sent,
                "bytes_down": owner.enclave.bytes_received,
                "attestation": owner.guarantee,
            }
        )


@app.command()
def export(
    config: ConfigOption,
    output: OutputOption,
    merge: MergeOption = None,
    step: StepOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch the own adapter out of the enclave, as a PEFT folder."""
    out = Output(as_json)
    with _open(config, set_, out) as owner:
        exported = owner.export(output, step, merge)
    out.say(f"adapter of step {exported} written to {output}")
    if merge is not None:
        out.say(f"model with the adapter merged in written to {merge}")
    out.result({"step": exported, "output": str(output), "merged": merge and str(merge)})


def _open(config: Path, overrides: Sequence[str] | None, out: Output) -> "EnclaveClient":
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.enclave.owner import EnclaveClient
    from cutlayer.enclave.owner_settings import EnclaveClientSettings
    from cutlayer.settings import load_settings

    settings = load_settings(EnclaveClientSettings, config, overrides or ())
    warn_of_expiry(settings.connection, out)
    if not settings.tee.required:
        out.warn(
            "tee.required = false: the other side proves nothing, and gets activations WITHOUT "
            "NOISE, from which it can rebuild your texts. For tests only"
        )
    return EnclaveClient(settings)


def _confine_files(settings: "EnclaveSettings", config: Path) -> bool:
    from cutlayer.tee.process.confine import confine_files

    confinement = settings.confinement()
    if confinement is None:
        return False
    return confine_files(confinement, [config, settings.state.key_file])


def _confined(settings: "EnclaveSettings", is_early: bool) -> "Confinement | None":
    from cutlayer.tee.process.confine import confine

    confinement = settings.confinement()
    return None if confinement is None else confine(confinement, is_early)


def _announce(
    server: "EnclaveServer",
    settings: "EnclaveSettings",
    confined: "Confinement | None",
    out: Output,
) -> None:
    spec = server.model.spec
    address = f"{settings.listen.address.rpartition(':')[0]}:{server.port}"
    source = None if settings.tee is None else settings.tee.attester.source
    inside = f"blocks {spec.lower} to {spec.n_block - 1} of {spec.n_block} and the LM head"
    out.say(f"inside       {inside} ({spec.model_type})")
    out.say(f"address      {address}")
    if source is None:
        out.warn("no section [tee]: this enclave proves nothing to anybody")
    else:
        label = "SIMULATED" if source == "simulated" else source
        out.say(f"evidence     {label}")
    for line in [] if confined is None else confined.lines():
        out.say(f"process      {line}")
    out.result(
        {
            "event": "ready",
            "address": address,
            "port": server.port,
            "health_port": server.health_port,
            "lower": spec.lower,
            "blocks": spec.n_block,
            "evidence": source,
            "process": None if confined is None else confined.details(),
        }
    )


def _reply(owner: "EnclaveClient", prompts: Sequence[str], out: Output) -> list[str]:
    """One reply streams; several are made together and printed one after the other."""
    if len(prompts) == 1:
        replies = owner.generate(prompts, on_piece=lambda piece: out.stream(piece.text))
        out.stream("\n")
        return replies
    replies = owner.generate(prompts)
    for number, reply in enumerate(replies, 1):
        out.say(f"[{number}] {reply}")
    return replies


def _result(
    owner: "EnclaveClient", progress: "Progress", shown: "TrainingProgress"
) -> dict[str, object]:
    losses = [record.loss for record in progress.history]
    validation = list(progress.evaluations.values())
    num_tokens = max(1, shown.num_tokens)
    return {
        "run_id": owner.run_id,
        "rounds": None if owner.settings.rounds is None else owner.settings.rounds.name,
        "step": progress.step,
        "best_step": progress.best_step,
        "new_steps": shown.num_steps,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "validation_loss": validation[-1] if validation else None,
        "rows_sent": 0 if owner.feeder is None else owner.feeder.num_sent,
        "seconds": round(shown.seconds, 3),
        "tokens_per_s": round(shown.num_tokens / shown.seconds, 2),
        "bytes_up": owner.enclave.bytes_sent,
        "bytes_down": owner.enclave.bytes_received,
        "bytes_up_per_token": round(owner.enclave.bytes_sent / num_tokens, 2),
        "bytes_down_per_token": round(owner.enclave.bytes_received / num_tokens, 2),
        "labels": owner.settings.labels.value,
        "attestation": owner.guarantee,
    }


def _print(result: dict[str, object], out: Output) -> None:
    if not result["new_steps"]:
        out.say(f"step {result['step']}: there was nothing left to train")
        return
    up, down = result["bytes_up_per_token"], result["bytes_down_per_token"]
    assert isinstance(up, float)
    assert isinstance(down, float)
    out.say(
        f"step {result['step']}: loss {result['loss_first']:.4f} to {result['loss_last']:.4f}, "
        f"{result['rows_sent']} rows sent, per token {format_bytes(up)} up and "
        f"{format_bytes(down)} down; {result['attestation']}"
    )
