"""Training that withholds vectors, against the unsplit model with shorter rows behind the cut."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cutlayer import Client
from cutlayer.client.settings import ClientSettings
from cutlayer.data.batches import Batch, BatchPlan, batch
from cutlayer.errors import ConfigError, DataError
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

NUM_STEPS = 4


class _Shortening:
    """Hooks that cut rows behind block 0: later blocks see what leaves, from position 0."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.places_M = torch.zeros(0, dtype=torch.long)
        layers[0].register_forward_hook(self._cut)
        for layer in layers[1:]:
            layer.register_forward_pre_hook(self._place, with_kwargs=True)

    def _cut(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output[:, self.places_M]

    def _place(
        self, module: nn.Module, inputs: object, options: dict[str, object]
    ) -> tuple[object, dict[str, object]]:
        cos, sin = options["position_embeddings"]  # type: ignore[misc]
        length = len(self.places_M)
        return inputs, {
            **options,
            "attention_mask": None,
            "position_embeddings": (cos[:, :length], sin[:, :length]),
        }


def _loss(peft: PeftModel, shortening: _Shortening, one: Batch) -> Tensor:
    shortening.places_M = (~one.withheld_N).nonzero().flatten()
    logits_MV = peft(input_ids=one.rows.tokens_N[None]).logits[0].float()
    # What predicts the scored tokens left; they themselves stayed.
    targets_M = one.labels_N.roll(-1)[shortening.places_M]
    return nn.functional.cross_entropy(logits_MV, targets_M, ignore_index=-100, reduction="sum")


def _expected(client: Client, adapter: Path, model: Path) -> list[float]:
    settings, losses = client.settings.train, []
    assert settings is not None
    base = AutoModelForCausalLM.from_pretrained(model)
    shortening = _Shortening(base.model.layers)
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    rows = client.rows().train
    plan = BatchPlan(
        num_rows=len(rows), rows_per_step=settings.rows_per_step, seed=0, steps=NUM_STEPS
    )
    for step in range(NUM_STEPS):
        chosen = [batch(rows, [index]) for index in plan.rows_of(step)]
        loss_sum = sum((_loss(peft, shortening, one) for one in chosen), torch.zeros(()))
        num_scored = sum(one.num_scored for one in chosen)
        (loss_sum / num_scored).backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss_sum.item() / num_scored)
    return losses


def _settings(model: Path, folder: Path, **changes: object) -> ClientSettings:
    """Rows that begin with private text and end with an answer of one token."""
    lines = [{"text": "ab" * (1 + n % 5) + "xy"[n % 2], "answer": "pq"[n % 2]} for n in range(24)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return client_settings(
        model,
        folder,
        privacy__withhold="private",
        data__train=str(folder / "answers.jsonl"),
        data__prompt_template="{text}: so",
        data__completion_template="{answer}",
        data__append_eos=False,
        train__steps=NUM_STEPS,
        train__clip_norm=None,
        train__schedule="constant",
        **changes,
    )


@pytest.mark.parametrize("parts", [["head", "trunk", "tail"], ["trunk", "tail"]])
@pytest.mark.parametrize("keep_share", [0.0, 0.4])
def test_losses_equal_those_of_shorter_rows(
    tmp_path: Path, parts: list[str], keep_share: float
) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = _settings(model, tmp_path, adapter__parts=parts, privacy__keep_share=keep_share)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        expected = _expected(client, tmp_path / "first", model)
        num_left = client.ledger.num_vectors["activations"]
        rows = client.rows().train
    assert [record.loss for record in history] == pytest.approx(expected, rel=1e-4)
    kept = [not stays for row in rows for stays in row.is_withheld or row.is_private]
    assert num_left % sum(kept) == 0 or "head" in parts
    assert num_left < sum(record.num_tokens for record in history)


def test_a_completion_of_several_private_tokens_is_refused_before_anything_leaves(
    tmp_path: Path,
) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, privacy__withhold="private")
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        with pytest.raises(DataError, match="keep completions to one token"):
            client.train()
        assert client.ledger.num_lines == 0


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
