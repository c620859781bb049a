"""`cutlayer enclave`: later blocks, their adapters and the LM head in an attested place.

`serve` runs that place; `train`, `generate` and `export` are its owners'. The work is in `enclave`.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cutlayer.cli.options import (
    AdapterOption,
    ConfigOption,
    JsonOption,
    MergeOption,
    PromptArgument,
    PromptFileOption,
    SetOption,
    StepOption,
)
from cutlayer.cli.output import Output
from cutlayer.cli.results import (
    print_exported,
    print_replies,
    print_training,
    reply_pairs,
    training_totals,
)
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
    sent = f"{result['rows_sent']} rows sent"
    print_training(result, "step", sent, str(result["attestation"]), out)
    out.result(result)


@app.command()
def generate(
    config: ConfigOption,
    prompt: PromptArgument = None,
    file: PromptFileOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue texts; without PROMPT and --file, all of stdin is one prompt."""
    from cutlayer.cli.generate import read_prompts

    out = Output(as_json)
    prompts = read_prompts(prompt or [], file)
    with _open(config, set_, out) as owner:
        replies = print_replies(owner, prompts, out)
        out.result(
            {
                "replies": reply_pairs(prompts, replies),
                "bytes_up": owner.enclave.bytes_sent,
                "bytes_down": owner.enclave.bytes_received,
                "attestation": owner.guarantee,
            }
        )


@app.command()
def export(
    config: ConfigOption,
    output: AdapterOption,
    merge: MergeOption = None,
    step: StepOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch the own adapter out of the enclave, as a PEFT folder."""
    out = Output(as_json)
    with _open(config, set_, out) as owner:
        exported = owner.export(output, step, merge)
    print_exported(exported, output, merge, out)


def _open(config: Path, overrides: Sequence[str] | None, out: Output) -> "EnclaveClient":
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.enclave.owner import EnclaveClient
    from cutlayer.enclave.owner_settings import EnclaveClientSettings, LabelPlace
    from cutlayer.settings import load_settings

    settings = load_settings(EnclaveClientSettings, config, overrides or ())
    warn_of_expiry(settings.connection, out)
    if settings.labels is LabelPlace.SERVER:
        out.warn(
            'labels = "server": labels, losses and the distribution of the text are visible at '
            f"{settings.connection.address}, which proves nothing, and it gets activations WITHOUT "
            "NOISE, from which it can rebuild your texts"
        )
    elif not settings.tee.required:
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
        if settings.shared_labels:
            out.warn(
                "shared_labels = true: owners' labels and the distribution of their texts are "
                "visible on this machine"
            )
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
            "takes_labels": settings.takes_labels,
            "process": None if confined is None else confined.details(),
        }
    )


def _result(
    owner: "EnclaveClient", progress: "Progress", shown: "TrainingProgress"
) -> dict[str, object]:
    return {
        "run_id": owner.run_id,
        "rounds": None if owner.settings.rounds is None else owner.settings.rounds.name,
        **training_totals(owner, progress, shown),
        "rows_sent": 0 if owner.feeder is None else owner.feeder.num_sent,
        "labels": owner.settings.labels.value,
        "attestation": owner.guarantee,
    }
