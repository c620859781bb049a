"""The memory benchmark: its files are sparse and loadable, its counts are what they say."""

from pathlib import Path

import msgspec
import psutil
import torch
from safetensors import safe_open

from benchmarks.memory import SHAPES, compare, write_sparse_llama
from benchmarks.memory_client import SavedBytes, peak_resident_bytes

_TINY = msgspec.structs.replace(
    SHAPES["smoke"], hidden_size=64, num_heads=4, intermediate_size=128, vocab_size=1024
)


def test_the_7b_file_has_the_published_size_and_takes_no_disk(tmp_path: Path) -> None:
    write_sparse_llama(tmp_path, SHAPES["standard"])
    status = (tmp_path / "model.safetensors").stat()
    num_parameters = 6_738_415_616
    assert status.st_size > 2 * num_parameters
    assert status.st_size - 2 * num_parameters < 100_000
    assert status.st_blocks * 512 < 1_000_000


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    write_sparse_llama(tmp_path, _TINY)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.5.mlp.down_proj.weight").shape == (64, 128)
        assert file.get_tensor("lm_head.weight").dtype == torch.float16


def test_a_client_holds_its_tensors_and_a_bounded_rest(tmp_path: Path) -> None:
    write_sparse_llama(tmp_path, _TINY)
    use, empty_bytes = compare(tmp_path, _TINY, "float32", num_threads=1)
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights = 4 * (4 * block + 2 * 1024 * 64 + 64)
    lora = 2 * 4 * 8 * (4 * (4 * 128 + 3 * 192))
    assert weights + lora <= use.tensor_bytes <= weights + lora + 10_000
    assert use.activation_bytes > 128 * 64 * 4 * 4
    assert empty_bytes > 50_000_000
    assert use.peak_bytes >= use.loaded_peak_bytes > 0


def test_saved_bytes_leave_weights_out_and_count_a_storage_once() -> None:
    weight = torch.ones(100, requires_grad=True)
    saved = SavedBytes([weight])
    with saved.hooks():
        x = torch.ones(100)
        (weight * x).sum().backward()
        (weight * x[:50].repeat(2)).sum().backward()
    assert saved.total == 2 * 400


def test_the_peak_stays_when_memory_is_given_back() -> None:
    block = torch.ones(60_000_000 // 4)
    held_bytes = psutil.Process().memory_info().rss
    del block
    # The kernel counts resident pages per core and sums them up late.
    assert peak_resident_bytes() >= held_bytes - 5_000_000
