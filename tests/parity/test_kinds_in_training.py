"""Training, resuming, serving and averaging prefixes and sparse rows, against plain loops."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, get_scheduler

from cutlayer import Client
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.train import Report
from cutlayer.data.batches import BatchPlan
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.federation.settings import FederationPolicy
from cutlayer.federation.strategy import STRATEGIES
from cutlayer.model.adapters import attach
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.partition import Cut
from cutlayer.model.rows import pack
from cutlayer.settings import parse_settings
from tests.federation_worlds import NAMES, at_once, federation, lone_settings, owners
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

NUM_STEPS = 6
SIZES: dict[str, dict[str, object]] = {
    "prefix": {"num_virtual_tokens": 4},
    "sparse": {"qkv_ratio": 0.5, "dense_ratio": 0.25},
}
KINDS = [["sparse"], ["lora", "prefix", "sparse"]]
by_kinds = pytest.mark.parametrize("kinds", KINDS, ids="+".join)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values"),
]
Compute = Callable[[list[int]], Tensor]


def _adapter(kinds: list[str]) -> dict[str, object]:
    own = {kind: SIZES[kind] for kind in kinds if kind in SIZES}
    return {"kinds": kinds, "rank": 4, "alpha": 8, **own}


def _changes(kinds: list[str]) -> dict[str, object]:
    return {f"adapter__{name}": value for name, value in _adapter(kinds).items()}


def _plain_losses(client: Client, compute: Compute, parameters: list[nn.Parameter]) -> list[float]:
    settings = client.settings.train
    assert settings is not None
    adamw = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    schedule = get_scheduler("linear", adamw, settings.warmup_steps, NUM_STEPS)
    rows = client.rows().train
    plan = BatchPlan(
        num_rows=len(rows), rows_per_step=settings.rows_per_step, seed=0, steps=NUM_STEPS
    )
    losses = []
    for step in range(NUM_STEPS):
        loss_sum, num_scored = torch.zeros(()), 0
        for index in plan.rows_of(step):
            labels = torch.tensor(rows[index].labels)
            loss_sum = loss_sum + nn.functional.cross_entropy(
                compute(list(rows[index].tokens))[:-1], labels[1:], reduction="sum"
            )
            num_scored += int((labels[1:] != -100).sum())
        (loss_sum / num_scored).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(loss_sum.item() / num_scored)
    return losses


def _unsplit(model: Path, client: Client) -> tuple[Compute, list[nn.Parameter]]:
    """The whole model in one process, by plain autograd."""
    parts = load_parts(model, Cut(0, 4))
    adapters = [attach(part, client.settings.adapter) for part in parts]
    head, trunk, tail = parts

    def compute(tokens: list[int]) -> Tensor:
        rows = pack([tokens])
        logits: Tensor = tail(trunk(head(rows), rows), rows)
        return logits

    return compute, [p for adapter in adapters for p in adapter.parameters()]


class _Stop(Exception):
    """Stands for a kill between two steps."""


def _stop_after_three(report: Report) -> None:
    if report.record.step == 3:
        raise _Stop


@by_kinds
def test_split_training_equals_unsplit_and_goes_on_after_a_restart(
    kinds: list[str], tmp_path: Path
) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, train__save_every=2, **_changes(kinds))
    limits = {"max_sparse_ratio": 0.5}
    with (
        running_server(server_settings(model, tmp_path, **limits)) as server,
        client_of(server, settings) as client,
        pytest.raises(_Stop),
    ):
        client.train(_stop_after_three)
    with (
        running_server(server_settings(model, tmp_path, **limits)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        losses = _plain_losses(client, *_unsplit(model, client))
        client.export(tmp_path / "adapter")
        names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    assert history[-1].loss < history[0].loss
    assert names == (set(kinds) if len(kinds) > 1 else _FILES[kinds[0]])


_FILES = {
    "prefix": {"adapter_config.json", "adapter_model.safetensors"},
    "sparse": {"sparse_config.json", "sparse_model.safetensors"},
}


def test_a_prefix_learns_as_in_peft_and_generates_what_peft_does(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, **_changes(["prefix"]))
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        client.export(tmp_path / "last", step=NUM_STEPS)
        peft = _trainable(model, tmp_path / "first")
        weights = [p for p in peft.parameters() if p.requires_grad]
        losses = _plain_losses(client, lambda row: peft(torch.tensor([row])).logits[0], weights)
        prompt = client.tokenizer("abab:", add_special_tokens=False)["input_ids"]
        (found,) = client.generate_ids([prompt], SamplingSettings(temperature=0, max_new_tokens=8))
        assert client.context_length == 128 - 4
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model)
    trained = PeftModel.from_pretrained(base, tmp_path / "last").eval()
    expected = trained.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
    )
    assert found == expected[0, len(prompt) :].tolist()


def _trainable(model: Path, exported: Path) -> PeftModel:
    """PEFT itself loads a prefix only to infer."""
    base = AutoModelForCausalLM.from_pretrained(model)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft = get_peft_model(base, config)
    weight = load_file(exported / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.copy_(weight)
    return peft


def _ends(client: Client) -> dict[str, Tensor]:
    states = client._parts.adapter_states()
    return {**states["head"], **states["tail"]}


def test_a_round_gives_the_mean_of_members_who_trained_alone(tmp_path: Path) -> None:
    kinds = ["lora", "prefix", "sparse"]
    model = tiny_llama_folder(tmp_path)
    rules = federation(rounds=1, local_steps=1, adapter=_adapter(kinds))
    changes = _changes(kinds)
    limits = {"max_sparse_ratio": 0.5}
    settings = server_settings(model, tmp_path, rules, {"max_clients": 1}, **limits)
    with running_server(settings) as server:
        clients = owners(server, model, tmp_path, **changes)
        at_once([client.train for client in clients])
        together = _ends(clients[0])
        for client in clients:
            client.close()
    alone, weights = [], []
    (tmp_path / "alone").mkdir(mode=0o700)
    with running_server(server_settings(model, tmp_path / "alone", **limits)) as server:
        for number, name in enumerate(NAMES):
            own = lone_settings(
                model, tmp_path / "alone", name, 8 + 4 * number,
                train__steps=1, train__schedule="constant", **changes,
            )  # fmt: skip
            with client_of(server, own, name) as client:
                weights.append(client.train().history[0].num_scored)
                alone.append(_ends(client))
    for key, value in together.items():
        total = sum(weights)
        mean = sum(w / total * ends[key] for w, ends in zip(weights, alone, strict=True))
        # Secure aggregation rounds to fixed point.
        torch.testing.assert_close(value, mean, rtol=0, atol=2e-6)
        assert float(value.abs().max()) > 0


@pytest.mark.parametrize("strategy", ["fedavg_frozen_a", "svd"])
@by_kinds
def test_rules_about_lora_s_factors_refuse_other_kinds(kinds: list[str], strategy: str) -> None:
    table = {
        "name": "trial",
        "rounds": 1,
        "adapter": _adapter(kinds),
        "strategy": {"kind": strategy},
        "secure": {"enabled": False},
    }
    with pytest.raises(ConfigError, match=rf"strategy {strategy} works on LoRA's factors"):
        parse_settings(FederationPolicy, table, "federation")
    parse_settings(FederationPolicy, {**table, "adapter": {"rank": 2}}, "federation")
    assert STRATEGIES.get(strategy).needs_lora


@pytest.mark.parametrize(
    ("limits", "kinds", "message"),
    [
        ({"adapter_kinds": ["lora"]}, ["prefix"], r"kinds has prefix; this server takes lora"),
        ({"max_virtual_tokens": 3}, ["prefix"], r"num_virtual_tokens=4 exceeds 3"),
        ({}, ["sparse"], r"qkv_ratio=0.5 exceeds 0.25, this server's limit"),
    ],
)
def test_a_server_refuses_what_its_operator_does_not_allow(
    limits: dict[str, object], kinds: list[str], message: str, tmp_path: Path
) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, **_changes(kinds))
    with (
        running_server(server_settings(model, tmp_path, **limits)) as server,
        client_of(server, settings) as client,
        pytest.raises(CutlayerError, match=message),
    ):
        client.train()
