"""Re-cuts where the server is more than a process, and where the owner keeps more than a run."""

from pathlib import Path

import pytest
import torch

from cutlayer import Client, SamplingSettings
from cutlayer.client.train import Report
from cutlayer.model.partition import Cut
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.storage.vault import new_key_file
from tests.attested_worlds import AttestedWorld
from tests.integration.test_replicas import fronting, make_world
from tests.masked_worlds import running_workers
from tests.recut_worlds import leave_request, losses_of, owner, wide_server
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, running_server

STEPS = 6
SMALL: dict[str, object] = {"train__steps": STEPS, "train__save_every": 2}


def _recut_after(client: Client, step: int, cut: Cut) -> list[float]:
    """Losses of a training whose cut moves."""

    def ask(report: Report) -> None:
        if report.record.step == step:
            leave_request(client.settings.run.folder, cut)

    return losses_of(client.train(ask).history).tolist()


def test_a_replica_behind_a_front_does_it(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    table = world.server(count=1)
    table["model"] = {"path": str(world.model), "lower": 0, "upper": 4}
    settings = {**SMALL, "train__clip_norm": 0}
    with fronting(table) as front:
        with Client(world.client("court", front.port, **settings)) as client:
            whole = losses_of(client.train().history).tolist()
        with Client(world.client("clinic", front.port, **settings)) as client:
            assert _recut_after(client, 3, Cut(0, 2)) == whole
            assert (client.run_id[-3:], client.settings.model.upper) == (".c1", 2)
            assert client.recut(lower=1).to_client == [0]


def test_masked_layers_are_those_of_the_new_parts(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with running_workers(private_folder(tmp_path / "workers")) as (accelerator, dealer, key):
        masked = {
            "accelerator": accelerator,
            "dealer": dealer,
            "dealer_key": key,
            "allow_same_machine": True,
        }
        plain = owner(model, tmp_path, **SMALL)
        settings = parse_settings(type(plain), {**plain.model_dump(), "masked": masked}, "masked")
        with (
            running_server(wide_server(model, tmp_path)) as server,
            client_of(server, settings) as client,
        ):
            losses = _recut_after(client, 3, Cut(2, 4))
            assert client.run_id.endswith(".c1")
            names = [type(m).__name__ for m in client.head.modules()]
            assert names.count("MaskedLinear") == 2 * 7
    folder = private_folder(tmp_path / "plain")
    with (
        running_server(wide_server(model, folder)) as server,
        client_of(server, owner(model, folder, **SMALL)) as client,
    ):
        whole = losses_of(client.train().history)
    assert torch.allclose(torch.tensor(losses, dtype=torch.float64), whole, rtol=0.02)


def test_an_attested_server_proves_itself_again_at_the_new_cut(tmp_path: Path) -> None:
    world = AttestedWorld.make(tmp_path)
    with world.serving() as served, Client(world.client(served.port)) as client:
        client.train()
        # It serves blocks 1 to 2.
        assert client.recut(lower=2).to_client == [1]
        text = client.generate(["ab"], SamplingSettings(max_new_tokens=2))
        assert len(text) == 1
        assert client.attestation is not None
        assert client.attestation.line.startswith("attestation: SIMULATED")


def test_with_noise_and_a_storage_key_it_goes_on_and_everything_is_counted(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    key = tmp_path / "storage.key"
    new_key_file(key)
    noise = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}
    settings = owner(model, tmp_path, **SMALL, **noise, run__key_file=str(key))
    with running_server(wide_server(model, tmp_path)) as server:
        with client_of(server, settings) as client:
            losses = _recut_after(client, 3, Cut(1, 4))
            assert len(losses) == STEPS
            assert client.ledger.num_vectors["adapters"] == 1
            assert "adapters" in client.privacy_report().uncounted
        # The settings still say 1 and 3; the sealed run says where its cut is.
        with client_of(server, settings) as client:
            assert client.settings.model.upper == 4
            assert client.train().step == STEPS
            assert client.export(tmp_path / "adapter") == STEPS


@pytest.mark.parametrize("cut", [Cut(0, 4), Cut(3, 4)])
def test_generation_after_a_recut_says_what_it_said_before(tmp_path: Path, cut: Cut) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = owner(model, tmp_path, **SMALL, sampling__max_new_tokens=6)
    with (
        running_server(wide_server(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        client.train()
        sampling = settings.sampling
        before = client.generate(["abab", "ab"], sampling), client.score([[97, 98]])
        client.recut(cut.lower, cut.upper, share_adapter=True)
        assert client.generate(["abab", "ab"], sampling) == before[0]
        assert torch.allclose(client.score([[97, 98]]), before[1], rtol=1e-5, atol=1e-5)
        talk = client.chat()
        assert list(talk.ask("ab"))
        talk.close()
