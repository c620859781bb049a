"""Split training against the same steps of transformers + PEFT on the unsplit model."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, get_scheduler

from cutlayer import Client
from cutlayer.data.batches import BatchPlan
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

NUM_STEPS = 6


def _unsplit_losses(client: Client, adapter: Path, model: Path) -> tuple[list[float], list[float]]:
    settings = client.settings.train
    assert settings is not None
    base = AutoModelForCausalLM.from_pretrained(model)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    schedule = get_scheduler("linear", adamw, settings.warmup_steps, NUM_STEPS)
    rows = client.rows().train
    plan = BatchPlan(
        num_rows=len(rows), rows_per_step=settings.rows_per_step, seed=0, steps=NUM_STEPS
    )
    losses, norms = [], []
    for step in range(NUM_STEPS):
        loss_sum, num_scored = torch.zeros(()), 0
        for index in plan.rows_of(step):
            tokens = torch.tensor([rows[index].tokens])
            labels = torch.tensor(rows[index].labels)
            logits = peft(input_ids=tokens).logits[0, :-1].float()
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits, labels[1:], ignore_index=-100, reduction="sum"
            )
            num_scored += int((labels[1:] != -100).sum())
        (loss_sum / num_scored).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(loss_sum.item() / num_scored)
    return losses, norms


@pytest.mark.parametrize("in_flight", [1, 3])
def test_losses_and_norms_equal_those_of_unsplit_peft(tmp_path: Path, in_flight: int) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, train__in_flight=in_flight)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        losses, norms = _unsplit_losses(client, tmp_path / "first", model)
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    assert [record.grad_norm for record in history] == pytest.approx(norms, rel=1e-5)
    assert history[-1].loss < 0.85 * history[0].loss


def test_frozen_head_needs_no_gradient_and_equals_peft_on_the_rest(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, adapter__parts=["trunk", "tail"])
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        frozen_down = client.trunk.bytes_received
    trained = client_settings(model, tmp_path, run__folder=str(tmp_path / "trained"))
    with (
        running_server(server_settings(model, tmp_path / "other")) as server,
        client_of(server, trained) as client,
    ):
        client.train()
        assert frozen_down < 0.75 * client.trunk.bytes_received
    assert history[-1].loss < history[0].loss
