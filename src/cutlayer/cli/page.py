"""The web page of a server that `cutlayer serve` runs. The page itself is in `dashboard`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from cutlayer.dashboard.serve import Dashboard
    from cutlayer.dashboard.server_view import FederationLike, ServerLike
    from cutlayer.server.settings import ServerSettings

__all__ = ["serving_page"]


@contextmanager
def serving_page(
    server: "ServerLike",
    federation: "FederationLike | None",
    settings: "ServerSettings",
    out: Output,
) -> "Iterator[Dashboard | None]":
    """Serve the page within the block, if the settings have one; says where it is.

    Raises:
        ConfigError: its address is taken, or token or TLS files are unusable.
        StorageError: the token file is readable by others, or cannot be written.
    """
    if settings.http is None:
        yield None
        return
    from cutlayer.dashboard.serve import start_dashboard
    from cutlayer.dashboard.server_view import OneServerView

    view = OneServerView(server, federation)
    try:
        page = start_dashboard(view, settings.http, settings.state.folder)
        try:
            out.say(f"page         {page.url}/ (token in {page.token_file})")
            yield page
        finally:
            page.stop()
    finally:
        view.close()
