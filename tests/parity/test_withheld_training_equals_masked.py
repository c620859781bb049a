"""Training that withholds private vectors, against the unsplit model with those vectors zeroed."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cutlayer import Client
from cutlayer.data.batches import BatchPlan, batch
from cutlayer.errors import ConfigError
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

NUM_STEPS = 4


class _Zeroing:
    """A hook that zeroes what the lower cut withholds."""

    def __init__(self) -> None:
        self.leaves_N1: Tensor = torch.ones(0)

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * self.leaves_N1


def _masked_losses(client: Client, adapter: Path, model: Path) -> list[float]:
    settings, losses, zeroing = client.settings.train, [], _Zeroing()
    assert settings is not None
    base = AutoModelForCausalLM.from_pretrained(model)
    base.model.layers[0].register_forward_hook(zeroing)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    rows = client.rows().train
    plan = BatchPlan(
        num_rows=len(rows), rows_per_step=settings.rows_per_step, seed=0, steps=NUM_STEPS
    )
    for step in range(NUM_STEPS):
        loss_sum, num_scored = torch.zeros(()), 0
        for index in plan.rows_of(step):
            one = batch(rows, [index])
            zeroing.leaves_N1 = (~one.private_N).float()[:, None]
            logits = peft(input_ids=one.rows.tokens_N[None]).logits[0, :-1].float()
            loss_sum = loss_sum + nn.functional.cross_entropy(
                logits, one.labels_N[1:], ignore_index=-100, reduction="sum"
            )
            num_scored += one.num_scored
        (loss_sum / num_scored).backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss_sum.item() / num_scored)
    return losses


@pytest.mark.parametrize("parts", [["head", "trunk", "tail"], ["trunk", "tail"]])
def test_losses_equal_those_of_zeroed_vectors(tmp_path: Path, parts: list[str]) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(
        model,
        tmp_path,
        privacy__withhold="private",
        data__prompt_template="Text: {text}:",
        adapter__parts=parts,
        train__steps=NUM_STEPS,
        train__clip_norm=None,
        train__schedule="constant",
    )
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        expected = _masked_losses(client, tmp_path / "first", model)
        summary = client.ledger
        rows = client.rows().train
    assert [record.loss for record in history] == pytest.approx(expected, rel=1e-4)
    num_template = {e.row_id: sum(not p for p in e.is_private) for e in rows}
    assert max(num_template.values()) > 0
    counted = summary.num_vectors["activations"]
    assert counted < sum(record.num_tokens for record in history)


def test_a_run_that_withholds_refuses_to_generate(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, privacy__withhold="private")
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        with pytest.raises(ConfigError, match="validation loss"):
            client.score([client.tokenizer.encode("abab:")])
        assert client.ledger.num_lines == 0
