"""Training and generation over an enclave against transformers and PEFT on the unsplit model."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, get_scheduler

from cutlayer.client.cached_row import Feed
from cutlayer.client.settings import SamplingSettings
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import Example
from cutlayer.enclave.owner import EnclaveClient
from cutlayer.enclave.server import EnclaveServer
from tests.enclave_worlds import (
    enclave_settings,
    loopback_of,
    owner_of,
    owner_settings,
    running_enclave,
)
from tests.tiny_models import tiny_llama_folder, tiny_model

NUM_STEPS, LR = 6, 0.02


def _unsplit(
    model: Path, adapter: Path, rows: list[Example], num_steps: int = NUM_STEPS
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and trained weights of the same steps without any split."""
    base = AutoModelForCausalLM.from_pretrained(model)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    schedule = get_scheduler("linear", adamw, 0, num_steps)
    plan = BatchPlan(num_rows=len(rows), rows_per_step=8, seed=0, steps=num_steps)
    losses = []
    for step in range(num_steps):
        loss_sum, num_scored = torch.zeros(()), 0
        for index in plan.rows_of(step):
            labels = torch.tensor(rows[index].labels)[1:]
            logits = peft(input_ids=torch.tensor([rows[index].tokens])).logits[0, :-1].float()
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=-100, reduction="sum"
            )
            num_scored += int((labels != -100).sum())
        (loss_sum / num_scored).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(loss_sum.item() / num_scored)
    return losses, {k: v.detach().clone() for k, v in get_peft_model_state_dict(peft).items()}


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_losses_and_trained_weights_equal_unsplit_peft(tmp_path: Path, family: str) -> None:
    model, _ = tiny_model(family, tmp_path)
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        owner_of(server, owner_settings(model, tmp_path / "a")) as owner,
    ):
        history = owner.train().history
        owner.export(tmp_path / "first", step=0)
        owner.export(tmp_path / "last")
        rows = owner.rows().train
    losses, weights = _unsplit(model, tmp_path / "first", rows)
    trained = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    assert trained.keys() == weights.keys()
    assert not any(".layers.0." in key or ".h.0." in key for key in trained)
    for key, tensor in trained.items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=2e-5)


def test_replies_and_scores_equal_unsplit_peft(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = owner_settings(model, tmp_path / "a")
    prompts = [[70, 80, 90, 100, 33], [65, 66, 67], [40] * 30]
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        owner_of(server, settings) as owner,
    ):
        owner.train()
        owner.export(tmp_path / "out")
        logits_BV = owner.score(prompts)
        replies = owner.generate_ids(prompts, SamplingSettings(max_new_tokens=12))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    for prompt, reply, logits_V in zip(prompts, replies, logits_BV, strict=True):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(logits_V, peft(input_ids=tokens).logits[0, -1])
        wanted = peft.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        assert reply == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kinds", [["sparse"], ["lora", "sparse"]], ids="+".join)
def test_scores_equal_those_of_the_merged_model(tmp_path: Path, kinds: list[str]) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = owner_settings(model, tmp_path / "a", adapter={"kinds": kinds, "rank": 4})
    prompt = [70, 80, 90, 100, 33]
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        owner_of(server, settings) as owner,
    ):
        owner.train()
        owner.export(tmp_path / "out", merged=tmp_path / "merged")
        logits_BV = owner.score([prompt])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted_V = merged(input_ids=torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(logits_BV[0], wanted_V, rtol=1e-4, atol=1e-4)


def test_a_conversation_survives_a_restart_of_the_enclave(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = enclave_settings(model, tmp_path)
    servers = [EnclaveServer(settings)]
    mine = owner_settings(model, tmp_path / "a")
    with EnclaveClient(mine, connect=lambda: loopback_of(servers[-1])) as owner:
        session = owner.generator().session()
        row = session.open_row(40)
        session.step([Feed(row=row, tokens=[70, 80, 90])])
        servers[0].stop(grace_s=0)
        servers.append(EnclaveServer(settings))
        owner.enclave.close()
        (logits_SV,) = session.step([Feed(row=row, tokens=[33, 34], num_logits=2)])
        assert session.num_replays == 1
    servers[-1].stop(grace_s=0)
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        wanted = base(input_ids=torch.tensor([[70, 80, 90, 33, 34]])).logits[0, -2:]
    torch.testing.assert_close(logits_SV, wanted)
