"""One real server and real clients over mutual TLS in this process, for comparisons of numbers.

It compares nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cutlayer import Client, ClientSettings, ServerSettings, TrunkServer
from cutlayer.identity.provision import member_files
from cutlayer.settings import parse_settings

__all__ = ["LOWER", "UPPER", "parity_client", "parity_server"]

LOWER, UPPER = 1, 5
"""Cut of the tiny models of six blocks."""

Sections = Mapping[str, Mapping[str, object]]


@contextmanager
def parity_server(model: Path, state: Path, kit: Path, extra: Sections) -> Iterator[TrunkServer]:
    """A listening server.

    Args:
        model: tiny model of six blocks.
        state: its private folder.
        kit: its certificate.
        extra: more sections of its settings.
    """
    table = {
        "model": {"path": str(model), "lower": LOWER, "upper": UPPER},
        "listen": {"address": "127.0.0.1:0", "tls": member_files(kit).tls},
        "state": {"folder": str(state)},
        **extra,
    }
    server = TrunkServer(parse_settings(ServerSettings, table, "parity server"))
    server.start()
    try:
        yield server
    finally:
        server.stop(grace_s=0)


def parity_client(model: Path, folder: Path, port: int, kit: Path, extra: Sections) -> Client:
    """A client without noise whose values travel as they are (codec raw)."""
    folder.mkdir(mode=0o700)
    table = {
        "model": {"path": str(model), "lower": LOWER, "upper": UPPER},
        "connection": {
            "address": f"127.0.0.1:{port}",
            "codec": "raw",
            "tls": member_files(kit).tls,
        },
        "privacy": {"mechanism": "none"},
        "run": {"folder": str(folder / "run")},
        "adapter": {"rank": 8, "alpha": 16},
        **extra,
    }
    return Client(parse_settings(ClientSettings, table, "parity client"))
