"""The page of a trunk server: its token, its application, and where it listens.

It answers nothing itself (`app`) nor knows sockets (`web.serve`).
"""

import time
from dataclasses import dataclass
from pathlib import Path

from cutlayer.dashboard.app import create_app
from cutlayer.dashboard.view import ServerView
from cutlayer.web.auth import Gate, ensure_token
from cutlayer.web.serve import WebServer, serve_app
from cutlayer.web.settings import HttpSettings

__all__ = ["Dashboard", "start_dashboard"]


@dataclass(frozen=True)
class Dashboard:
    """A page that is being served."""

    served: WebServer
    token_file: Path
    """Who may read it may look at the page."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.served.port

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        return self.served.url

    def stop(self) -> None:
        """Stop answering; calls in flight get two seconds."""
        self.served.stop()


def start_dashboard(view: ServerView, settings: HttpSettings, state_folder: Path) -> Dashboard:
    """Serve the page of `view`; a missing token file is made.

    Raises:
        ConfigError: the address is taken, the token is too short, or the TLS files are unusable.
        StorageError: the token file is readable by others, or cannot be written.
    """
    token_file = settings.token_file or state_folder / "http.token"
    gate = Gate(ensure_token(token_file), settings.login_s, time.time)
    app = create_app(view, gate, settings.is_encrypted)
    return Dashboard(serve_app(app, settings), token_file)
