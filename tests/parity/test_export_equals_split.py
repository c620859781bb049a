"""The exported adapter on the unsplit model computes what the three parts compute."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.model.adapters import Adapter, AdapterSettings, attach, base_only
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.export import export_adapter, merge_adapter
from cutlayer.model.partition import Cut
from cutlayer.model.rows import pack
from tests.tiny_models import FAMILIES, tiny_model

SETTINGS = AdapterSettings(rank=3, alpha=6.0)
ROW = [5, 6, 7, 8, 9, 200, 3, 17, 99]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def stir(adapter: Adapter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = adapter.state()
    adapter.load(
        {key: torch.randn(value.shape, generator=generator) * 0.2 for key, value in state.items()}
    )


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    return model.eval()(torch.tensor([ROW])).logits[0]


@pytest.mark.parametrize("cut", [Cut(1, 3), Cut(0, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_export_and_merge_compute_what_the_parts_compute(
    family: str, cut: Cut, tmp_path: Path
) -> None:
    folder = tiny_model(family, tmp_path)[0]
    parts = load_parts(folder, cut)
    adapters = [attach(part, SETTINGS) for part in parts]
    for seed, adapter in enumerate(adapters):
        stir(adapter, seed)
    rows = pack([ROW])
    head, trunk, tail = parts
    split = tail(trunk(head(rows), rows), rows)

    states = [adapter.state() for adapter in adapters]
    export_adapter(tmp_path / "adapter", states, SETTINGS, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    base_logits = logits_of(base)
    joined = PeftModel.from_pretrained(base, tmp_path / "adapter")
    held = {name.replace(".default", "") for name, _ in joined.named_parameters() if "lora" in name}
    assert held == set().union(*states)
    torch.testing.assert_close(logits_of(joined), split, atol=1e-5, rtol=1e-5)
    assert (split - base_logits).abs().max() > 0.01

    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(report.values())
    torch.testing.assert_close(logits_of(merged), split, atol=2e-5, rtol=1e-5)

    with base_only(head), base_only(trunk), base_only(tail):
        unadapted = tail(trunk(head(rows), rows), rows)
    torch.testing.assert_close(unadapted, base_logits, atol=1e-5, rtol=1e-5)
