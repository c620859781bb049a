"""Rounds over the real server against the plain things that they replace."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from cutlayer import Client, TrunkServer
from cutlayer.client.run_state import Progress
from cutlayer.errors import ConfigError
from cutlayer.model.tensor_file import read_tensors
from tests.tiny_models import tiny_llama_folder
from tests.worlds import Table, client_of, client_settings, running_server, server_settings, write_rows

NAMES = ("anna", "bert", "cleo")


def federation(**changes: object) -> Table:
    """Three members, two rounds of two steps."""
    table: Table = {
        "name": "trial",
        "rounds": 2,
        "local_steps": 2,
        "adapter": {"rank": 4, "alpha": 8},
        "gather_s": 0.0,
    }
    return {**table, **changes}


def owner_settings(model: Path, folder: Path, name: str, num_rows: int, **changes: object):
    """An owner with rows of its own."""
    own = folder / name
    own.mkdir(mode=0o700)
    settings = client_settings(
        model,
        own,
        federation__name="trial",
        data__train=str(write_rows(own / "rows.jsonl", num_rows)),
        train__steps=None,
        **changes,
    )
    return settings


def together(clients: Sequence[Client]) -> list[Progress]:
    """All members train at once; their progress, or the first error."""
    results: dict[int, Progress] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            results[number] = clients[number].train()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    return [results[n] for n in range(len(clients))]


@pytest.mark.parametrize("is_secure", [True, False])
def test_members_end_with_the_same_adapters(tmp_path: Path, is_secure: bool) -> None:
    model = tiny_llama_folder(tmp_path)
    rules = federation(secure={"enabled": is_secure})
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = [
            client_of(
                server,
                owner_settings(
                    model, tmp_path, name, 8 + 4 * n, federation__share_plain_updates=not is_secure
                ),
                name,
            )
            for n, name in enumerate(NAMES)
        ]
        progress = together(clients)
        states = [client._parts.adapter_states() for client in clients]
        for client in clients:
            client.close()
    assert [p.step for p in progress] == [2, 2, 2]
    for state in states[1:]:
        for part in ("head", "tail"):
            for key, x in states[0][part].items():
                assert torch.equal(x, state[part][key])
    assert progress[0].history[-1].loss < progress[0].history[0].loss
