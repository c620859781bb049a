"""`cutlayer masked worker`: multiply for masked parts, as accelerator or as dealer.

What a worker does is in `tee.masked.worker`.
"""

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from cutlayer.tee.masked.dealer_key import DealerKey
    from cutlayer.tee.masked.settings import MaskedWorkerSettings

__all__ = ["app", "worker"]

app = typer.Typer(no_args_is_help=True, help="Masked parts: their workers (docs/masked.md).")


@app.command()
def worker(config: ConfigOption, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Run an accelerator or a dealer for masked parts until SIGTERM or SIGINT."""
    from cutlayer.model.threads import set_threads
    from cutlayer.settings import load_settings
    from cutlayer.tee.masked.multiplier import Multiplier
    from cutlayer.tee.masked.settings import MaskedWorkerSettings
    from cutlayer.tee.masked.worker import Worker

    out = Output(as_json)
    settings = load_settings(MaskedWorkerSettings, config, set_ or ())
    set_threads(settings.threads)
    key = _key(settings)
    multiplier = Multiplier(settings.kernel, settings.device, settings.max_weight_bytes)
    running = Worker(
        settings.role, multiplier, key, settings.max_weight_bytes, idle_s=settings.idle_s
    )
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    address = running.start(settings.listen)
    _announce(settings, address, key, out)
    asked.wait()
    running.stop()
    out.say("stopped")
    out.result({"event": "stopped"})


def _key(settings: "MaskedWorkerSettings") -> "DealerKey | None":
    from cutlayer.tee.masked.dealer_key import DealerKey

    return None if settings.key_file is None else DealerKey.load(settings.key_file)


def _announce(
    settings: "MaskedWorkerSettings", address: str, key: "DealerKey | None", out: Output
) -> None:
    out.say(f"{settings.role} at {address}, {settings.kernel} on {settings.device}")
    if key is not None:
        out.say(f"masked.dealer_key = {key.public_hex}")
    out.result(
        {
            "event": "ready",
            "role": settings.role,
            "address": address,
            "dealer_key": None if key is None else key.public_hex,
        }
    )
