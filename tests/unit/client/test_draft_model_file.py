"""The small model against transformers' own, and the vocabularies that it refuses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cutlayer.client.draft_model import ModelDrafter
from cutlayer.client.draft_model_file import load_small_model
from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.folder import ModelFolder
from tests.tiny_models import VOCAB_SIZE, tiny_llama_folder, tiny_model

TEXT = [70, 80, 90, 70, 80]


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return ModelFolder(folder).tokenizer()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_small_model_equals_transformers_after_truncations(family: str, tmp_path: Path) -> None:
    folder, plain = tiny_model(family, tmp_path, seed=1)
    row = load_small_model(str(folder), tokenizer_of(folder), VOCAB_SIZE).new_row()
    row.extend(TEXT)
    row.extend([1])
    row.extend([2])
    row.truncate(3)
    logits_V = row.extend([5, 6, 7])
    with torch.no_grad():
        expected_V = plain(torch.tensor([[*TEXT[:3], 5, 6, 7]])).logits[0, -1]
    assert row.length == 6
    assert torch.allclose(logits_V, expected_V, atol=1e-4)


def test_streams_share_weights_and_not_caches(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    model = load_small_model(str(folder), tokenizer_of(folder), VOCAB_SIZE)
    one, other = model.new_row(), model.new_row()
    alone_V = one.extend(TEXT)
    other.extend([3, 4])
    assert torch.equal(model.new_row().extend(TEXT), alone_V)
    assert (one.length, other.length) == (5, 2)


def test_greedy_guesses_equal_what_the_model_itself_generates(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = plain.generate(torch.tensor([TEXT]), max_new_tokens=6, do_sample=False)
    row = load_small_model(str(folder), tokenizer_of(folder), VOCAB_SIZE).new_row()
    draft = ModelDrafter(row, SamplingSettings(), draw=0, least_confidence=0.0).propose(TEXT, 6)
    assert list(draft.tokens) == expected[0, len(TEXT) :].tolist()


def test_a_wider_lm_head_is_met_with_tokens_that_cannot_be_drawn(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    wide, narrow = (
        load_small_model(str(folder), tokenizer_of(folder), size).new_row().extend(TEXT)
        for size in (VOCAB_SIZE + 8, VOCAB_SIZE - 4)
    )
    assert wide[-8:].tolist() == [-torch.inf] * 8
    assert torch.equal(wide[: VOCAB_SIZE - 4], narrow)


def changed_tokenizer(folder: Path, to: Path, change: str) -> PreTrainedTokenizerBase:
    to.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    table = json.loads((to / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    if change == "swapped":
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    if change == "split":
        table["pre_tokenizer"]["add_prefix_space"] = True
    (to / "tokenizer.json").write_text(json.dumps(table))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(to)
    if change == "more":
        tokenizer.add_tokens(["zebra"])
    return tokenizer


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("more", r"has 260 tokens, the model's own 261"),
        ("swapped", r"2 tokens have another number"),
        ("split", r"splits the same text differently"),
    ],
)
def test_another_tokenizer_is_refused_with_the_difference(
    change: str, text: str, tmp_path: Path
) -> None:
    folder = tiny_llama_folder(tmp_path)
    ours = changed_tokenizer(folder, tmp_path / "ours", change)
    with pytest.raises(ConfigError, match=text) as refused:
        load_small_model(str(folder), ours, VOCAB_SIZE)
    assert "generation.speculation.model" in str(refused.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_small_model(str(tmp_path), tokenizer_of(folder), VOCAB_SIZE)
