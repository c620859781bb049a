"""Trunk hosts in a row against the unsplit model, and against one trunk with the same blocks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cutlayer.client.settings import SamplingSettings
from tests.chain_worlds import (
    THREE,
    TWO,
    chain_settings,
    client_of_hops,
    hop_server,
    running_hops,
    six_blocks,
)
from tests.parity.test_generation_equals_unsplit import PROMPTS, _unsplit
from tests.unsplit_worlds import unsplit_losses
from tests.worlds import client_of, client_settings, running_server

GREEDY = SamplingSettings(max_new_tokens=10)


@pytest.mark.parametrize(("edges", "in_flight"), [(TWO, 3), (THREE, 2)])
def test_losses_norms_and_export_equal_those_of_unsplit_peft(
    tmp_path: Path, edges: tuple[int, ...], in_flight: int
) -> None:
    model = six_blocks(tmp_path)
    settings = chain_settings(model, tmp_path, edges, train__in_flight=in_flight)
    with (
        running_hops(model, tmp_path, edges) as servers,
        client_of_hops(servers, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        base = AutoModelForCausalLM.from_pretrained(model)
        losses, norms = unsplit_losses(client, tmp_path / "first", base)
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    assert [record.grad_norm for record in history] == pytest.approx(norms, rel=1e-5)
    assert history[-1].loss < 0.85 * history[0].loss


@pytest.mark.parametrize("parts", [["head", "tail"], ["trunk", "tail"], ["tail"]])
def test_whatever_trains_a_chain_equals_one_trunk_of_the_same_blocks(
    tmp_path: Path, parts: list[str]
) -> None:
    model, changes = six_blocks(tmp_path), {"adapter__parts": parts, "train__eval_every": 2}
    changes |= {"data__validation_fraction": 0.25, "train__save_every": 2}
    folder = str(tmp_path / "whole")
    whole = client_settings(model, tmp_path, model__upper=5, run__folder=folder, **changes)
    with (
        running_server(hop_server(model, tmp_path / "one", 1, 5)) as server,
        client_of(server, whole) as client,
    ):
        expected = client.train()
        wanted = torch.cat([client.score([prompt]) for prompt in PROMPTS])
        client.export(tmp_path / "a", merged=tmp_path / "merged-a")
    with (
        running_hops(model, tmp_path) as servers,
        client_of_hops(servers, chain_settings(model, tmp_path, **changes)) as client,
    ):
        found = client.train()
        logits = torch.cat([client.score([prompt]) for prompt in PROMPTS])
        client.export(tmp_path / "b", merged=tmp_path / "merged-b")
    losses = [record.loss for record in found.history]
    assert losses == pytest.approx([record.loss for record in expected.history], rel=1e-5)
    assert found.evaluations == pytest.approx(expected.evaluations, rel=1e-5)
    assert torch.allclose(logits, wanted, atol=1e-4, rtol=1e-4)
    one, other = (load_file(tmp_path / f"merged-{n}" / "model.safetensors") for n in "ab")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


@pytest.mark.parametrize("edges", [TWO, THREE])
def test_ragged_greedy_batch_over_hops_equals_unsplit_token_for_token(
    tmp_path: Path, edges: tuple[int, ...]
) -> None:
    model = six_blocks(tmp_path)
    expected = [_unsplit(model, prompt, 10) for prompt in PROMPTS]
    settings = chain_settings(model, tmp_path, edges, generation__prefill_tokens=16)
    with (
        running_hops(model, tmp_path, edges) as servers,
        client_of_hops(servers, settings) as client,
    ):
        assert client.generate_ids(PROMPTS, GREEDY) == expected
        long = [[1 + (7 * n) % 250 for n in range(100)]]
        assert client.generate_ids(long, GREEDY) == [_unsplit(model, long[0], 10)]
