"""The demo's scores equal those of the unsplit model, and its export check can fail."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cutlayer import Client
from cutlayer.data.tasks import ChoiceTask
from cutlayer.demo.measure import export_difference, held_out
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

PROMPTS = [(5, 6, 7, 8), (9, 10), (11, 12, 13)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def client(model: Path, tmp_path: Path) -> Iterator[Client]:
    settings = client_settings(model, tmp_path, train__steps=2)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as opened,
    ):
        yield opened


def test_held_out_scores_are_those_of_the_unsplit_model(client: Client, model: Path) -> None:
    tasks = [ChoiceTask(tuple(range(1, 3 + n)), ((7,), (20, 1), (30,)), n % 3) for n in range(30)]
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.inference_mode():
        logits_BV = torch.stack([whole(torch.tensor([t.prompt])).logits[0, -1] for t in tasks])
    answers = torch.tensor([t.choices[t.answer][0] for t in tasks])
    chosen = logits_BV[:, [7, 20, 30]].argmax(dim=1)
    right = (chosen == torch.tensor([t.answer for t in tasks])).float().mean()
    found = held_out(client, tasks)
    assert found.num_rows == 30
    assert found.accuracy == pytest.approx(float(right))
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits_BV, answers)), 1e-5)


def test_export_check_sees_equality_and_a_changed_adapter(
    client: Client, model: Path, tmp_path: Path
) -> None:
    client.train()
    adapter = tmp_path / "adapter"
    client.export(adapter)
    assert export_difference(client, model, adapter, PROMPTS) < 1e-5
    path = adapter / "adapter_model.safetensors"
    changed = {k: v * 1.5 if ".lora_B." in k else v for k, v in load_file(path).items()}
    save_file(changed, path)
    assert export_difference(client, model, adapter, PROMPTS) > 1e-4
