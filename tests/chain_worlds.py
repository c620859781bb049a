"""Chains of places over a tiny model of six blocks: trunk hosts in a row, all over loopback."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from cutlayer import Client, ClientSettings, ServerSettings, TrunkServer
from cutlayer.settings import parse_settings
from tests.tiny_models import tiny_model
from tests.worlds import Table, client_settings, loopback, running_server

NUM_BLOCKS = 6
TWO, THREE = (1, 3, 5), (1, 2, 4, 5)
"""Edges of the hops: the client has block 0 and block 5."""


def six_blocks(folder: Path) -> Path:
    """A tiny model."""
    return tiny_model("llama", folder, num_hidden_layers=NUM_BLOCKS)[0]


def hop_server(
    model: Path, folder: Path, lower: int, upper: int, **limits: object
) -> ServerSettings:
    """A trunk host of these blocks."""
    table: Table = {
        "model": {"path": str(model), "lower": lower, "upper": upper},
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "limits": limits,
        "state": {"folder": str(folder / f"server{lower}")},
    }
    return parse_settings(ServerSettings, table, "test server")


def chain_settings(
    model: Path,
    folder: Path,
    edges: Sequence[int] = TWO,
    privacy: Table | None = None,
    places: Sequence[str] = ("server", "server", "server"),
    **changes: object,
) -> ClientSettings:
    """An owner whose trunk has hops with these edges; `privacy` is that of the later ones."""
    hops = []
    for number, (lower, upper) in enumerate(itertools.pairwise(edges)):
        hop: Table = {"place": places[number], "lower": lower, "upper": upper}
        if number:
            address = f"127.0.0.1:{number + 1}"
            hop["connection"] = {"address": address, "codec": "raw"}
            hop["privacy"] = privacy or {"mechanism": "none"}
        hops.append(hop)
    plain = client_settings(model, folder, model__lower=edges[0], model__upper=edges[-1], **changes)
    table = {**plain.model_dump(mode="json", exclude_none=True), "hops": hops}
    return parse_settings(ClientSettings, table, "test client")


@contextmanager
def running_hops(
    model: Path, folder: Path, edges: Sequence[int] = TWO, **limits: object
) -> Iterator[list[TrunkServer]]:
    """One server per hop, each with exactly its blocks."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(running_server(hop_server(model, folder, *cut, **limits)))
            for cut in itertools.pairwise(edges)
        ]


def client_of_hops(
    servers: Sequence[TrunkServer], settings: ClientSettings, name: str = "clinic"
) -> Client:
    """An owner whose connections go to these servers, in order."""
    first, *later = [partial(loopback, server, name=name) for server in servers]
    return Client(settings, connect=first, connect_hops=later)
