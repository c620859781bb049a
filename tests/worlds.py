"""A small world to test in: one trunk server and one data owner over a tiny model.

The server's real service is reached through a loopback channel, which encodes every frame.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cutlayer import Client, ClientSettings, ServerSettings, TrunkServer
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import Channel, LoopbackChannel, Peer

ALL_ROLES = frozenset({"train", "generate"})
TOPICS = ("trade", "music", "law", "sport")

Table = dict[str, object]


def write_rows(path: Path, num_rows: int = 24) -> Path:
    """Ragged prompt and completion rows that a tiny model can learn."""
    rows = [
        {"text": "ab" * (1 + index % 7) + TOPICS[index % 4][0], "topic": TOPICS[index % 4]}
        for index in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def server_settings(
    model: Path,
    folder: Path,
    federation: Table | None = None,
    batch: Table | None = None,
    **limits: object,
) -> ServerSettings:
    """A trunk of blocks 1 to 3 in `folder`, which coordinates a federation if there is one."""
    table: dict[str, object] = {
        "model": {"path": str(model), "lower": 1, "upper": 3},
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "limits": limits,
        "state": {"folder": str(folder / "server")},
    }
    if federation is not None:
        table["federation"] = federation
    if batch is not None:
        table["batch"] = batch
    return parse_settings(ServerSettings, table, "test server")


def owner_tables(folder: Path) -> dict[str, Table]:
    """What every owner in `folder` has, whatever is on the other side."""
    return {
        "connection": {"address": "127.0.0.1:1", "plaintext": True, "codec": "raw"},
        "run": {"folder": str(folder / "run")},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {
            "train": str(write_rows(folder / "rows.jsonl")),
            "prompt_template": "{text}:",
            "completion_template": " {topic}",
            "chat_template": False,
        },
        "train": {"steps": 6, "rows_per_step": 8, "micro_batch_rows": 3, "lr": 0.02},
    }


def client_settings(model: Path, folder: Path, **changes: object) -> ClientSettings:
    """An owner with blocks 0 and 3; `changes` replace keys, such as train__lr=0.1."""
    table: dict[str, Table] = {
        "model": {"path": str(model), "lower": 1, "upper": 3},
        "privacy": {"mechanism": "none"},
        **owner_tables(folder),
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        table.setdefault(section, {})[key] = value
    return parse_settings(ClientSettings, table, "test client")


@contextmanager
def running_server(settings: ServerSettings) -> Iterator[TrunkServer]:
    """A server that does not listen; reach it by `loopback`."""
    server = TrunkServer(settings)
    try:
        yield server
    finally:
        server.stop(grace_s=0)


def loopback(
    server: TrunkServer, roles: frozenset[str] = ALL_ROLES, name: str = "clinic"
) -> Channel:
    """A channel of the owner of that name."""
    return LoopbackChannel(server, Peer(name=name, roles=roles, serial=None, address="test"))


def client_of(server: TrunkServer, settings: ClientSettings, name: str = "clinic") -> Client:
    """An owner whose every connection goes to this server."""
    return Client(settings, connect=lambda: loopback(server, name=name))
