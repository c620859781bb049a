"""Owners with different cuts share one trunk; each learns and writes what it would at any cut."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cutlayer import Client, ServerSettings
from cutlayer.client.settings import ClientSettings, SamplingSettings
from cutlayer.errors import SpecMismatch, StorageError
from cutlayer.model.cut import Cut
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.wire.messages import Commit, OpenSession
from tests.tiny_models import tiny_model
from tests.unit.server.trunk_world import opening, tiny_host, tiny_trunk
from tests.worlds import client_of, client_settings, running_server, server_settings

CUTS = {"clinic": Cut(0, 4), "bank": Cut(1, 3), "firm": Cut(2, 4), "shop": Cut(0, 1)}
PROMPTS = [[97, 98, 99], [98], [97, 97, 98, 98, 97]]


def _wide(model: Path, folder: Path) -> ServerSettings:
    """A server that holds all blocks."""
    table = server_settings(model, folder).model_dump(mode="json", exclude_none=True)
    table["model"] |= {"lower": 0, "upper": 4}
    return parse_settings(ServerSettings, table, "wide server")


def _owner(model: Path, tmp_path: Path, name: str, cut: Cut) -> ClientSettings:
    folder = private_folder(tmp_path / name)
    return client_settings(model, folder, model__lower=cut.lower, model__upper=cut.upper)


def _learn(client: Client, folder: Path) -> tuple[list[float], list[list[int]], Path]:
    progress = client.train()
    losses = [record.loss for record in progress.history]
    ids = client.generate_ids(PROMPTS, SamplingSettings(max_new_tokens=6))
    client.export(folder)
    return losses, ids, folder


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_owners_of_all_cuts_learn_and_write_the_same_at_once(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, tmp_path)[0]
    plain = private_folder(tmp_path / "plain")
    with (
        running_server(server_settings(model, plain)) as server,
        client_of(server, _owner(model, plain, "one", Cut(1, 3))) as client,
    ):
        expected = _learn(client, plain / "adapter")
    with running_server(_wide(model, tmp_path)) as server, ThreadPoolExecutor() as threads:
        clients = {
            name: client_of(server, _owner(model, tmp_path, name, cut), name)
            for name, cut in CUTS.items()
        }
        futures = {
            name: threads.submit(_learn, client, tmp_path / f"{name}-adapter")
            for name, client in clients.items()
        }
        found = {name: future.result() for name, future in futures.items()}
        for client in clients.values():
            client.close()
    weights = load_file(expected[2] / "adapter_model.safetensors")
    for losses, ids, folder in found.values():
        assert losses == pytest.approx(expected[0], rel=1e-5)
        assert ids == expected[1]
        others = load_file(folder / "adapter_model.safetensors")
        assert others.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, rtol=0, atol=2e-4)


def test_a_cut_beyond_the_server_s_blocks_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)[0]
    settings = _owner(model, tmp_path, "clinic", Cut(0, 3))
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
        pytest.raises(SpecMismatch, match="within the blocks that the server holds"),
    ):
        client.train()


def test_a_saved_run_opens_at_its_own_cut_alone(tmp_path: Path) -> None:
    trunk = tiny_trunk(tmp_path)
    host = tiny_host(tmp_path, trunk)
    host.open_run("a", opening(), Cut(1, 2))
    host.commit("a", Commit(run_id="run", commit=None, save=True, step=0))
    for wrong in (Cut(1, 3), Cut(2, 3)):
        with pytest.raises(StorageError, match=r"cut at 1:2 .*cutlayer recut"):
            host.open_run("a", opening(), wrong)
        with pytest.raises(StorageError, match="cut at 1:2"):
            host.open_session("a", OpenSession(max_lengths=[], run_id="run"), wrong)
    assert host.open_run("a", opening(), Cut(1, 2)) == 0
