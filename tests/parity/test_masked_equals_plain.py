"""Masked parts train and generate as plain ones do, over real workers and real sockets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cutlayer import ClientSettings, Rows, SamplingSettings, ServerSettings
from cutlayer.errors import ModelError, PeerMisbehaved
from cutlayer.model.adapter_slots import Segment
from cutlayer.model.adapters import AdapterSettings, attach, use_segments
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.partition import Cut
from cutlayer.settings import parse_settings
from cutlayer.tee.masked.field import PRIME
from cutlayer.tee.masked.hook import mask_parts, release_parts
from cutlayer.tee.masked.linear import MaskedLinear
from cutlayer.tee.masked.settings import MaskedSettings
from cutlayer.tee.masked.worker import Worker
from tests.masked_worlds import HostileAccelerator, masked_table, running_workers
from tests.tiny_models import tiny_model
from tests.worlds import Table, client_of, client_settings, running_server, server_settings


@pytest.fixture
def masked(tmp_path: Path) -> Iterator[Table]:
    with masked_table(tmp_path) as table:
        yield table


def _masked_server(plain: ServerSettings, masked: Table) -> ServerSettings:
    return parse_settings(ServerSettings, {**plain.model_dump(), "masked": masked}, "test")


def _masked_client(plain: ClientSettings, masked: Table) -> ClientSettings:
    return parse_settings(ClientSettings, {**plain.model_dump(), "masked": masked}, "test")


def _run(folder: Path, model: Path, masked: Table | None) -> tuple[list[float], list[str]]:
    folder.mkdir()
    server, client = server_settings(model, folder), client_settings(model, folder, train__steps=6)
    if masked is not None:
        server, client = _masked_server(server, masked), _masked_client(client, masked)
    with running_server(server) as trunk, client_of(trunk, client) as owner:
        losses = [record.loss for record in owner.train().history]
        texts = owner.generate(["abab", "ab"], SamplingSettings(max_new_tokens=6))
    return losses, texts


def test_training_ends_where_plain_training_ends(tmp_path: Path, masked: Table) -> None:
    model, _ = tiny_model("llama", tmp_path)
    plain, plain_texts = _run(tmp_path / "plain", model, None)
    other, other_texts = _run(tmp_path / "masked", model, masked)
    assert plain[-1] < 0.9 * plain[0]
    for found, wanted in zip(other, plain, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    assert other_texts == plain_texts


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_part_of_a_family_gives_the_same_numbers(family: str, tmp_path: Path) -> None:
    model, _ = tiny_model(family, tmp_path)
    rows = Rows(lengths=(5, 3), starts=(0, 0), tokens_N=torch.arange(8))
    found = []
    with running_workers(tmp_path) as (accelerator, _, _):
        settings = MaskedSettings(accelerator=accelerator, source="precompute")
        for is_masked in (False, True):
            parts = load_parts(model, Cut(1, 3))
            if is_masked:
                mask_parts(settings, *parts)
                linear = [m for p in parts for m in p.modules() if isinstance(m, torch.nn.Linear)]
                assert linear
                assert all(isinstance(layer, MaskedLinear) for layer in linear)
            head, trunk, tail = parts
            with torch.no_grad():
                found.append(tail(trunk(head(rows), rows), rows))
            release_parts(*parts)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-3


@pytest.mark.parametrize("adapter_first", [True, False])
def test_adapters_on_a_masked_part_have_the_same_gradients(
    tmp_path: Path, adapter_first: bool
) -> None:
    model, _ = tiny_model("llama", tmp_path)
    rows = Rows(lengths=(5, 3), starts=(0, 0))
    found = []
    with running_workers(tmp_path) as (accelerator, _, _):
        settings = MaskedSettings(accelerator=accelerator, source="precompute")
        for is_masked in (False, True):
            _, trunk, _ = load_parts(model, Cut(1, 3))
            if is_masked and not adapter_first:
                mask_parts(settings, trunk)
            adapter = attach(trunk, AdapterSettings(rank=4))
            torch.manual_seed(0)
            for parameter in adapter.parameters():
                parameter.data.normal_(std=0.1)
            if is_masked and adapter_first:
                mask_parts(settings, trunk)
            h_ND = torch.randn(8, 32).requires_grad_()
            trunk(h_ND, rows).square().sum().backward()
            grads = [h_ND.grad, *(adapter.gradients()[key] for key in sorted(adapter.gradients()))]
            found.append(torch.cat([grad.flatten() for grad in grads]))
            release_parts(trunk)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-3


def test_adapters_of_several_clients_share_a_masked_call(tmp_path: Path) -> None:
    model, _ = tiny_model("llama", tmp_path)
    rows = Rows(lengths=(5, 3), starts=(0, 0))
    found = []
    with running_workers(tmp_path) as (accelerator, _, _):
        settings = MaskedSettings(accelerator=accelerator, source="precompute")
        for is_masked in (False, True):
            _, trunk, _ = load_parts(model, Cut(1, 3))
            if is_masked:
                mask_parts(settings, trunk)
            torch.manual_seed(0)
            adapters = [attach(trunk, AdapterSettings(rank=4), name) for name in ("one", "two")]
            for adapter in adapters:
                for parameter in adapter.parameters():
                    parameter.data.normal_(std=0.1)
            h_ND = torch.randn(8, 32).requires_grad_()
            segments = [Segment(adapter="one", num_tokens=5), Segment(adapter="two", num_tokens=3)]
            with use_segments(trunk, segments):
                trunk(h_ND, rows).square().sum().backward()
            grads = [grad for adapter in adapters for grad in adapter.gradients().values()]
            found.append(torch.cat([h_ND.grad.flatten(), *(grad.flatten() for grad in grads)]))
            release_parts(trunk)
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-3


def test_sparse_adapters_say_that_a_masked_part_has_no_weights(tmp_path: Path) -> None:
    model, _ = tiny_model("llama", tmp_path)
    with running_workers(tmp_path) as (accelerator, _, _):
        _, trunk, _ = load_parts(model, Cut(1, 3))
        mask_parts(MaskedSettings(accelerator=accelerator, source="precompute"), trunk)
        with pytest.raises(ModelError, match="train lora on it instead"):
            attach(trunk, AdapterSettings(kinds=["sparse"]))
        release_parts(trunk)


def test_experts_and_other_devices_are_refused(tmp_path: Path) -> None:
    model, _ = tiny_model("mixtral", tmp_path)
    _, trunk, _ = load_parts(model, Cut(1, 3))
    with running_workers(tmp_path) as (accelerator, _, _):
        settings = MaskedSettings(accelerator=accelerator, source="precompute")
        with pytest.raises(ModelError, match="chooses among experts"):
            mask_parts(settings, trunk)


def test_a_wrong_product_at_the_server_reaches_nobody(tmp_path: Path) -> None:
    model, _ = tiny_model("llama", tmp_path)
    hostile = HostileAccelerator()
    worker = Worker("accelerator", hostile)
    masked: Table = {"accelerator": worker.start("127.0.0.1:0"), "source": "precompute"}
    server = _masked_server(server_settings(model, tmp_path), masked)
    with running_server(server) as trunk, client_of(trunk, client_settings(model, tmp_path)) as own:
        hostile.seen.clear()
        hostile.tamper = lambda products: (products + 1) % PRIME
        with pytest.raises(PeerMisbehaved, match="wrong product"):
            own.generate(["ab"], SamplingSettings(max_new_tokens=1))
        with pytest.raises(PeerMisbehaved, match="wrong product"):
            own.train()
    worker.stop()
    # The first product was wrong, and after it nothing was asked.
    assert len(hostile.seen) == 1
