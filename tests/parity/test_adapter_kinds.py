"""Prefix, sparse rows and combinations: against PEFT, against plain models, split and unsplit."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cutlayer.model.adapters import Adapter, AdapterSettings, AdapterState, attach
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.export import export_adapter, merge_adapter
from cutlayer.model.kv_cache import RowCache, bytes_per_token
from cutlayer.model.partition import Cut, PartModule
from cutlayer.model.rows import Rows, pack
from tests.tiny_models import FAMILIES, tiny_model
from tests.unit.model.test_adapter_kinds import COMBINATIONS, _settings

ROWS = ([5, 6, 7, 8, 9, 200, 3, 17, 99], [5, 6, 7, 8])
NUM_VECTORS = 3
PREFIX = AdapterSettings.model_validate(
    {"kinds": ["prefix"], "prefix": {"num_virtual_tokens": NUM_VECTORS}}
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    # PEFT's own call of transformers.
    pytest.mark.filterwarnings("ignore:.*past_key_values"),
]
Parts = Sequence[PartModule]


def _adapted(
    folder: Path, settings: AdapterSettings, cut: Cut, std: float = 0.05
) -> tuple[Parts, list[Adapter]]:
    parts = load_parts(folder, cut)
    adapters = [attach(part, settings) for part in parts]
    for seed, adapter in enumerate(adapters):
        generator = torch.Generator().manual_seed(seed)
        state = adapter.state()
        adapter.load({k: torch.randn(v.shape, generator=generator) * std for k, v in state.items()})
    return parts, adapters


def _logits(parts: Parts, rows: Rows, caches: Sequence[list[RowCache]] | None = None) -> Tensor:
    head, trunk, tail = parts
    of = caches or [None] * 3
    logits: Tensor = tail(trunk(head(rows, of[0]), rows, of[1]), rows, of[2])
    return logits


def _peft_prefix(model: PreTrainedModel, adapters: Sequence[Adapter]) -> PeftModel:
    """PEFT's own adapter, filled block by block in PEFT's order."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VECTORS)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        _embedding(peft).copy_(_in_peft_s_order([adapter.state() for adapter in adapters]))
    return peft.eval()


def _embedding(peft: PeftModel) -> nn.Parameter:
    return peft.prompt_encoder["default"].embedding.weight


def _in_peft_s_order(states: Sequence[AdapterState]) -> Tensor:
    state = {key: value for part in states for key, value in part.items()}
    index = {key: int(next(p for p in key.split(".") if p.isdigit())) for key in state}
    keys = sorted(state, key=lambda key: (index[key], key))
    return torch.cat([state[key] for key in keys], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_computes_and_learns_what_peft_s_does(family: str, tmp_path: Path) -> None:
    # GPT-2 adds positions where it embeds: in a head without blocks they count as well.
    cut = Cut(0, 4) if family == "gpt2" else Cut(1, 3)
    folder, model = tiny_model(family, tmp_path)
    parts, adapters = _adapted(folder, PREFIX, cut, std=1.0)
    peft = _peft_prefix(model, adapters)
    logits = _logits(parts, pack(ROWS))
    expected = [peft(torch.tensor([row])).logits[0] for row in ROWS]
    torch.testing.assert_close(logits, torch.cat(expected), atol=2e-5, rtol=1e-5)
    labels = torch.tensor([token for row in ROWS for token in row])
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    nn.functional.cross_entropy(torch.cat(expected), labels, reduction="sum").backward()
    ours = _in_peft_s_order([adapter.gradients() for adapter in adapters])
    theirs = _embedding(peft).grad
    assert theirs is not None
    assert torch.linalg.vector_norm(ours - theirs) < 2e-5 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@torch.no_grad()
def test_a_prefix_generates_what_peft_does(family: str, tmp_path: Path) -> None:
    folder, model = tiny_model(family, tmp_path)
    parts, adapters = _adapted(folder, PREFIX, Cut(1, 3), std=1.0)
    peft = _peft_prefix(model, adapters)
    caches = [[RowCache(len(part.block_range), 64) for _ in ROWS] for part in parts]
    tokens = [list(row) for row in ROWS]
    logits = _logits(parts, pack(tokens), caches)
    for _ in range(12):
        ends = torch.tensor([len(row) for row in ROWS]).cumsum(0) - 1
        last = logits[ends] if len(logits) > len(ROWS) else logits
        new = last.argmax(dim=1).tolist()
        starts = tuple(len(row) for row in tokens)
        for row, token in zip(tokens, new, strict=True):
            row.append(token)
        logits = _logits(parts, pack([[token] for token in new], starts), caches)
    for row, prompt in zip(tokens, ROWS, strict=True):
        generated = peft.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
        )
        assert generated[0].tolist() == row
    # The prefix is in no row's cache: its bytes are the adapter's.
    for part, own in zip(parts, caches, strict=True):
        per_token = bytes_per_token(part, torch.float32)
        assert [cache.nbytes for cache in own] == [64 * per_token] * 2


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_cached_rows_are_those_that_are_computed_anew(
    kinds: list[str], family: str, tmp_path: Path
) -> None:
    parts, _ = _adapted(tiny_model(family, tmp_path)[0], _settings(kinds), Cut(1, 3))
    whole = _logits(parts, pack(ROWS))
    caches = [[RowCache(len(part.block_range), 64) for _ in ROWS] for part in parts]
    first = _logits(parts, pack([row[:2] for row in ROWS]), caches)
    rest = _logits(parts, pack([row[2:] for row in ROWS], (2, 2)), caches)
    found = torch.cat([first[:2], rest[:7], first[2:], rest[7:]])
    torch.testing.assert_close(found, whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
def test_the_cut_makes_no_difference(kinds: list[str], tmp_path: Path) -> None:
    """Losses, gradients and steps of three parts are those of a model with one block of its own."""
    folder = tiny_model("llama", tmp_path)[0]
    found = []
    for cut in (Cut(1, 3), Cut(0, 4)):
        parts, adapters = [], []
        for part in load_parts(folder, cut):
            parts.append(part)
            adapters.append(attach(part, _settings(kinds)))
        loss = nn.functional.cross_entropy(
            _logits(parts, pack(ROWS)), torch.tensor([t for row in ROWS for t in row])
        )
        loss.backward()
        gradients = {k: v for adapter in adapters for k, v in adapter.gradients().items()}
        found.append((loss.item(), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_an_exported_prefix_loads_in_peft(family: str, tmp_path: Path) -> None:
    folder, model = tiny_model(family, tmp_path)
    parts, adapters = _adapted(folder, PREFIX, Cut(1, 3), std=1.0)
    states = [adapter.state() for adapter in adapters]
    export_adapter(tmp_path / "adapter", states, PREFIX, str(folder))
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    expected = torch.cat([peft(torch.tensor([row])).logits[0] for row in ROWS])
    torch.testing.assert_close(_logits(parts, pack(ROWS)), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [(family, ["lora", "sparse"]) for family in ("llama", "gpt2", "gpt_neox", "phi3", "gemma2")]
    + [("llama", ["sparse"]), ("gpt2", ["sparse"])],
)
@torch.no_grad()
def test_merged_sparse_rows_are_plain_weights(
    family: str, kinds: list[str], tmp_path: Path
) -> None:
    folder, base = tiny_model(family, tmp_path)
    settings = _settings(kinds, sparse={"qkv_ratio": 0.5, "dense_ratio": 0.125})
    parts, adapters = _adapted(folder, settings, Cut(1, 3))
    states = [adapter.state() for adapter in adapters]
    export_adapter(tmp_path / "adapter", states, settings, str(folder))
    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = torch.cat([merged(torch.tensor([row])).logits[0] for row in ROWS])
    torch.testing.assert_close(_logits(parts, pack(ROWS)), expected, atol=5e-5, rtol=1e-4)
    plain = torch.cat([base(torch.tensor([row])).logits[0] for row in ROWS])
    assert (plain - expected).abs().max() > 0.01
