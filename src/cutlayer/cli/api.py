"""`cutlayer api`: the OpenAI-compatible endpoint and its chat page, until it is told to stop.

Answering is in `api`, making tokens in `client`.
"""

import signal
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import ConfigOption, JsonOption, SetOption
from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from cutlayer.api.serve import Api
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings

__all__ = ["api"]

HostOption = Annotated[
    str | None, typer.Option("--host", help="Where to listen, instead of api.address's host.")
]
PortOption = Annotated[
    int | None, typer.Option("--port", min=0, max=65535, help="Its port; 0 picks one.")
]


def api(
    config: ConfigOption,
    host: HostOption = None,
    port: PortOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve the OpenAI API and a chat page on this side; SIGTERM lets replies finish, then ends."""
    from cutlayer.api.engine import ServedModel
    from cutlayer.api.serve import start_api
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.client.client import Client

    out = Output(as_json)
    settings = _settings(config, set_ or (), host, port)
    warn_of_expiry(settings.connection, out)
    asked = _stop_signals()
    with Client(settings) as client:
        model = ServedModel(
            name=settings.api.model_name or client.model_name,
            tokenizer=client.tokenizer,
            context_length=client.context_length,
            sampling=settings.sampling,
        )
        with closing(client.engine()) as engine:
            served = start_api(engine, model, settings.api, settings.run.folder)
            try:
                _announce(served, client, model.name, out)
                asked.wait()
                out.say("draining: replies under way finish, new requests are refused")
            finally:
                served.stop()
        out.say("stopped")
        out.result({"event": "stopped", "guarantee": client.guarantee})


def _settings(
    config: Path, overrides: Sequence[str], host: str | None, port: int | None
) -> "ClientSettings":
    """The file's settings, with another address where the options name one."""
    from cutlayer.client.settings import ClientSettings
    from cutlayer.settings import load_settings

    settings = load_settings(ClientSettings, config, overrides)
    if host is None and port is None:
        return settings
    host = settings.api.host if host is None else host.strip("[]")
    shown = f"[{host}]" if ":" in host else host
    address = f"api.address={shown}:{settings.api.port if port is None else port}"
    return load_settings(ClientSettings, config, [*overrides, address])


def _stop_signals() -> threading.Event:
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return asked


def _announce(served: "Api", client: "Client", name: str, out: Output) -> None:
    token = served.token_file
    key = '"unused"' if token is None else f'open("{token.absolute()}").read().strip()'
    out.say(f"chat page    {served.url}/")
    out.say(f"model        {name}")
    out.say(f"guarantee    {client.guarantee}")
    out.say(f"token        {token or 'none: whoever is on this machine may ask'}")
    out.say(f'openai       OpenAI(base_url="{served.url}/v1", api_key={key})')
    out.result(
        {
            "event": "ready",
            "url": served.url,
            "base_url": f"{served.url}/v1",
            "port": served.port,
            "model": name,
            "guarantee": client.guarantee,
            "token_file": None if token is None else str(token.absolute()),
        }
    )
