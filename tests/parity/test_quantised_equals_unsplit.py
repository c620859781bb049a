"""Over a quantised trunk a client trains and generates as the unsplit model does whose same blocks
are quantised, by the library's own layers."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cutlayer import ClientSettings, SamplingSettings, ServerSettings
from cutlayer.client.session import Feed
from cutlayer.settings import parse_settings
from tests.tiny_models import tiny_model
from tests.unsplit_worlds import unsplit_losses
from tests.worlds import client_of, client_settings, running_server, server_settings

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""The library's own layers of 4 bits are wrong where inputs are no multiple of 64."""
PROMPTS = ([65, 66, 67, 68, 69, 70, 71], [90, 91], [100, 101, 102, 103])
QUANTISED = ("int8", "nf4")


def _library_layer(layer: nn.Linear, weights: str) -> nn.Linear:
    shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    own: nn.Linear
    if weights == "nf4":
        own = Linear4bit(*shape, has_bias, compute_dtype=torch.float32, quant_type="nf4")
    else:
        own = Linear8bitLt(*shape, has_bias, has_fp16_weights=False)
    own.load_state_dict(layer.state_dict())
    return own.to("cpu")


def _unsplit(folder: Path, weights: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for block in model.get_decoder().layers[1:3]:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, _library_layer(layer, weights))
    # In training mode: else the library computes in 16 bits, and rounds activations to 8.
    return model.train()


def _server(model: Path, folder: Path, weights: str, **limits: object) -> ServerSettings:
    table = server_settings(model, folder, **limits).model_dump()
    table["model"]["trunk_weights"] = weights
    return parse_settings(ServerSettings, table, "test")


def _client(model: Path, folder: Path, weights: str, **changes: object) -> ClientSettings:
    return client_settings(model, folder, model__trunk_weights=weights, **changes)


@torch.no_grad()
def _greedy(model: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_new):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("weights", QUANTISED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_logits_and_greedy_tokens_equal_those_of_the_unsplit_model(
    family: str, weights: str, tmp_path: Path
) -> None:
    folder, _ = tiny_model(family, tmp_path, **WIDE)
    unsplit = _unsplit(folder, weights)
    with (
        running_server(_server(folder, tmp_path, weights)) as server,
        client_of(server, _client(folder, tmp_path, weights)) as client,
    ):
        session = client.session([20])
        (found_V,) = session.step([Feed(row=0, tokens=PROMPTS[0])])
        tokens = client.generate_ids(PROMPTS, SamplingSettings(max_new_tokens=12))
    with torch.no_grad():
        wanted_V = unsplit(torch.tensor([PROMPTS[0]])).logits[0, -1]
    torch.testing.assert_close(found_V.flatten(), wanted_V, rtol=1e-5, atol=1e-5)
    assert tokens == [_greedy(unsplit, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("weights", QUANTISED)
def test_losses_and_norms_of_training_equal_those_of_unsplit_peft(
    weights: str, tmp_path: Path
) -> None:
    folder, _ = tiny_model("llama", tmp_path, **WIDE)
    with (
        running_server(_server(folder, tmp_path, weights)) as server,
        client_of(server, _client(folder, tmp_path, weights)) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        losses, norms = unsplit_losses(client, tmp_path / "first", _unsplit(folder, weights))
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    assert [record.grad_norm for record in history] == pytest.approx(norms, rel=1e-5)
    assert history[-1].loss < 0.85 * history[0].loss


@pytest.mark.parametrize("weights", QUANTISED)
def test_adapters_of_every_kind_that_can_learn_there_are_used_in_generation(
    weights: str, tmp_path: Path
) -> None:
    folder, _ = tiny_model("llama", tmp_path)
    settings = _client(folder, tmp_path, weights, adapter__kinds=["lora", "prefix"])
    sampling = SamplingSettings(max_new_tokens=6)
    with running_server(_server(folder, tmp_path, weights)) as server:
        with client_of(server, settings) as client:
            before = client.generate(["abab", "ab"], sampling)
            history = client.train().history
            after = client.generate(["abab", "ab"], sampling)
        with client_of(server, settings) as again:
            assert again.generate(["abab", "ab"], sampling) == after
    assert history[-1].loss < 0.85 * history[0].loss
    assert after != before


@pytest.mark.parametrize("weights", QUANTISED)
def test_recomputing_a_quantised_trunk_accuses_no_honest_server(
    weights: str, tmp_path: Path
) -> None:
    folder, _ = tiny_model("llama", tmp_path)
    settings = _client(folder, tmp_path, weights, checks__spot_check_every=1)
    with (
        running_server(_server(folder, tmp_path, weights)) as server,
        client_of(server, settings) as client,
    ):
        client.train()
        client.generate(["abab", "ab"], SamplingSettings(max_new_tokens=6))
        assert client.trunk.checks.num_spot_checks >= 6
