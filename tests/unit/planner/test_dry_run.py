"""Bytes counted without memory are those of the same part with memory."""

from pathlib import Path

import pytest
import torch

from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.kv_cache import bytes_per_token
from cutlayer.model.partition import Cut, Part
from cutlayer.model.rows import Rows
from cutlayer.planner import dry_run
from cutlayer.planner.dry_run import LARGE_BYTES, Growth, Held, PartBytes, count_bytes
from tests.tiny_models import tiny_model


class _NoFakes:
    """Refuses, as for a model that looks at values, so that real blocks run."""

    def __init__(self, allow_non_fake_inputs: bool) -> None:
        raise RuntimeError("no fakes")


def _count(folder: Path) -> PartBytes:
    config = resolve_model(folder).config
    return count_bytes(config, AdapterSettings(), torch.float32, (24, 8), 30, (16,))


@pytest.mark.parametrize("family", ["gemma2"])
def test_a_run_without_numbers_counts_what_a_run_with_numbers_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny_model(family, tmp_path)
    fake = _count(folder)
    monkeypatch.setattr(dry_run, "FakeTensorMode", _NoFakes)
    assert _count(folder) == fake


def test_what_a_trunk_keeps_is_what_autograd_saves(tmp_path: Path) -> None:
    folder, _ = tiny_model("llama", tmp_path)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK)
    attach(trunk, AdapterSettings())
    trunk.train()
    weights = {t.untyped_storage().data_ptr() for t in (*trunk.parameters(), *trunk.buffers())}
    saved: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        y_ND = trunk.run_blocks(torch.zeros(32, 32).requires_grad_(), Rows(lengths=(24, 8)))
    assert y_ND.requires_grad
    # And the input, and the output, which nothing else holds here.
    kept = _count(folder).trunk_kept.at(2)
    assert kept.large == 0
    assert sum(saved.values()) == pytest.approx(kept.small, rel=0.1)


def test_experts_that_are_chosen_by_value_are_counted_too(tmp_path: Path) -> None:
    found = _count(tiny_model("mixtral", tmp_path)[0])
    assert found.tail_peak.at(1).small > found.tail_peak.at(0).small > 0
    assert found.head_kept.per_block.small > 0


def test_keys_and_values_are_those_of_a_loaded_part(tmp_path: Path) -> None:
    folder, _ = tiny_model("llama", tmp_path)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK)
    assert 2 * _count(folder).kv_bytes_per_token == bytes_per_token(trunk, torch.float32)


def test_a_model_of_one_block_has_parts_without_any(tmp_path: Path) -> None:
    found = _count(tiny_model("llama", tmp_path, num_hidden_layers=1)[0])
    assert found.trunk_kept.at(1).small > 0
    assert found.tail_peak.at(0).small > 0


def test_large_storages_are_told_apart_and_so_are_their_worst_moments() -> None:
    assert Held(5, 1).most(Held(2, 7)) == Held(5, 7)
    line = Growth(empty=Held(1, 0), first=Held(4, 9), per_block=Held(3, 0))
    assert [line.at(count) for count in (0, 1, 3)] == [Held(1, 0), Held(4, 9), Held(10, 9)]


def test_logits_of_a_large_vocabulary_are_large_storages(tmp_path: Path) -> None:
    folder, _ = tiny_model("llama", tmp_path, num_hidden_layers=1)
    config = resolve_model(folder).config
    config.vocab_size = 1 << 20
    found = count_bytes(config, AdapterSettings(), torch.float32, (24, 8), 30, (16,))
    logits = 4 * 30 * config.vocab_size
    assert logits > LARGE_BYTES
    assert 2 * logits <= found.tail_peak.at(0).large <= 4 * logits
