"""The endpoint at work: its token, its application, and where it listens.

It answers nothing itself (`app`) nor makes tokens (`client.engine`).
"""

import time
from dataclasses import dataclass
from pathlib import Path

from cutlayer.api.app import create_app
from cutlayer.api.engine import ServedModel, TokenEngine
from cutlayer.web.auth import Gate, ensure_token
from cutlayer.web.serve import WebServer, serve_app
from cutlayer.web.settings import ApiSettings

__all__ = ["Api", "start_api"]

_IDLE_CONNECTIONS = 192


@dataclass(frozen=True)
class Api:
    """An endpoint that is being served."""

    served: WebServer
    token_file: Path | None
    """Who may read it may ask; None: whoever is on this machine."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.served.port

    @property
    def url(self) -> str:
        """The page's address; the API is below it, at /v1."""
        return self.served.url

    def stop(self) -> None:
        """Take no more requests; replies under way get `api.drain_s`."""
        self.served.stop()


def start_api(
    engine: TokenEngine, model: ServedModel, settings: ApiSettings, run_folder: Path
) -> Api:
    """Serve the API and its page; a missing token file is made.

    Args:
        engine: what makes tokens; it must outlive the endpoint.
        model: whose tokens.
        settings: where to listen, and limits.
        run_folder: the owner's private folder, for a token file that the settings do not name.

    Raises:
        ConfigError: the address is taken, the token is too short, or the TLS files are unusable.
        StorageError: the token file is readable by others, or cannot be written.
    """
    gate, token_file = None, None
    if settings.needs_token:
        token_file = settings.token_file or run_folder / "api.token"
        gate = Gate(ensure_token(token_file), settings.login_s, time.time)
    app = create_app(engine, model, settings, gate)
    served = serve_app(
        app,
        settings,
        max_connections=settings.max_queue + _IDLE_CONNECTIONS,
        grace_s=settings.drain_s,
        stall_s=settings.stall_s,
    )
    return Api(served, token_file)
