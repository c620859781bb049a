"""`cutlayer train`: fine-tune as the settings say, and show how. Training is in `client`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption, TraceOption
from cutlayer.cli.output import Output
from cutlayer.cli.results import print_training, training_totals

if TYPE_CHECKING:
    from cutlayer.cli.progress import TrainingProgress
    from cutlayer.client.client import Client
    from cutlayer.client.run_state import Progress
    from cutlayer.client.settings import ClientSettings

__all__ = ["train"]

SettingsOption = Annotated[
    bool, typer.Option("--show-settings/--hide-settings", help="Print the resolved settings.")
]
RecordOption = Annotated[
    Path | None,
    typer.Option("--record", metavar="FILE", help="Write all frames, as the server sees them."),
]
TruthOption = Annotated[
    bool,
    typer.Option("--truth", help="With --record: write the private tokens to FILE.truth too."),
]


def train(
    config: ConfigOption,
    set_: SetOption = None,
    shows_settings: SettingsOption = True,
    trace: TraceOption = None,
    record: RecordOption = None,
    with_truth: TruthOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune; started again, it goes on from the newest step that both sides have saved.

    With a federation section it trains in that federation's rounds, until they end.
    """
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.cli.progress import TrainingProgress
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings
    from cutlayer.settings import load_settings
    from cutlayer.trace import Trace, written

    out = Output(as_json)
    recording = [] if record is None else [f"run.record_file={json.dumps(str(record))}"]
    recording += ["run.record_truth=true"] if with_truth else []
    settings = load_settings(ClientSettings, config, [*(set_ or ()), *recording])
    warn_of_expiry(settings.connection, out)
    tracer = None if trace is None else Trace(f"client {settings.run.folder.name}")
    with Client(settings, tracer=tracer) as client, written(tracer, trace):
        _keep_settings(settings, out if shows_settings else None)
        out.say(f"privacy: {client.guarantee}")
        verdict = _audit_verdict(client)
        out.say(verdict)
        with TrainingProgress(client) as shown:
            progress = client.train(shown.show)
        result = {**_result(client, progress, shown), "audit": verdict}
        told = client.privacy_report().summary(settings.privacy.budget.unit)
        proved = None if client.attestation is None else client.attestation.line
    speed = f"{result['tokens_per_s']} tokens/s"
    print_training(result, str(result["unit"]), speed, str(result["guarantee"]), out)
    out.say(f"so far: {told}")
    if proved is not None:
        out.say(proved)
    out.result(result)


def _audit_verdict(client: "Client") -> str:
    """What an audit found of these settings, or that none was made."""
    from cutlayer.audit.verdict import find_verdict, verdict_key, verdict_line, verdicts_folder

    key = verdict_key(client.settings, {**client.head.leaves, **client.tail.leaves})
    return verdict_line(find_verdict(key, verdicts_folder(None)))


def _keep_settings(settings: "ClientSettings", out: Output | None) -> None:
    """Save the resolved settings with the run, encrypted where the run is, and print them."""
    from cutlayer.demo.settings_text import settings_text
    from cutlayer.storage.files import write_atomic
    from cutlayer.storage.vault import open_run_vault, open_vault

    text = settings_text(settings)
    if out is not None:
        out.say(text.rstrip())
    vault = open_run_vault(settings.run.folder, open_vault(settings.run.key_file))
    data = vault.seal(text.encode(), "settings.toml")
    write_atomic(settings.run.folder / "settings.toml", data)


def _result(client: "Client", progress: "Progress", shown: "TrainingProgress") -> dict[str, object]:
    from cutlayer.client.attested import level
    from cutlayer.settings import settings_digest

    settings = client.settings
    return {
        "run_id": client.run_id,
        "federation": None if settings.federation is None else settings.federation.name,
        "folder": str(settings.run.folder),
        "unit": "step" if settings.federation is None else "round",
        **training_totals(client, progress, shown),
        "num_tokens": shown.num_tokens,
        "federation_bytes_up": client.federation_bytes[0],
        "federation_bytes_down": client.federation_bytes[1],
        "guarantee": client.guarantee,
        "assurance": level(client.attestation),
        "privacy": client.privacy_report().as_json(),
        "ledger": asdict(client.ledger),
        "settings_digest": settings_digest(settings),
    }
