"""A trunk over two processes gives the numbers of a whole one.

In float32 within 1e-5: forward, gradients of input and adapters, cached decode, several adapters
in one call, dropout, optimizer steps.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cutlayer.model.checkpoint import load_part
from cutlayer.model.partition import Part, Trunk
from tests.parity.tensor_parallel_worker import CUT, exercise
from tests.tiny_models import tiny_model

TOLERANCE = 1e-5
ROOT = Path(__file__).parents[2]
FAMILIES = (
    "gemma2",
    "glm4",
    "gpt_neox",
    "granite",
    "llama",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "starcoder2",
)
"""Every style of plan, biases on both sides, norms between, fused layers, parallel blocks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family, folder)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> dict[str, Tensor]:
    """What the leader of two processes got."""
    out = folder / "results.safetensors"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    worker = ["--nproc-per-node", "2", "-m", "tests.parity.tensor_parallel_worker"]
    done = subprocess.run(
        [*torchrun, *worker, str(folder), str(out), *FAMILIES],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_the_numbers_of_one(
    family: str, folder: Path, shared: dict[str, Tensor]
) -> None:
    trunk = load_part(folder / f"tiny-{family}", CUT, Part.TRUNK)
    assert isinstance(trunk, Trunk)
    for name, whole in exercise(trunk, family).items():
        found = shared[f"{family}/{name}"]
        tolerance = TOLERANCE * float(whole.abs().max().clamp_min(1e-3))
        assert torch.isfinite(found).all(), name
        assert torch.allclose(found, whole, rtol=0, atol=tolerance), name


def test_every_gradient_of_every_adapter_was_compared(shared: dict[str, Tensor]) -> None:
    # Seven layers in each of two blocks; the second adapter trains B of two layers only, and the
    # keys and values of a prefix.
    grads = [name for name in shared if name.startswith("llama/first/grads/base_model")]
    assert len(grads) == 2 * 2 * 7
    frozen_a = [name for name in shared if name.startswith("llama/joint/two/base_model")]
    assert len(frozen_a) == 2 * 2 + 2 * 2
    asked = [name for name in shared if name.startswith("llama/asked/")]
    assert len(asked) == 2 * len(grads) + 1
    assert all(shared[name].abs().max() > 0 for name in (*grads, *frozen_a, *asked))


def test_a_process_holds_half_of_what_is_shared_out(
    folder: Path, shared: dict[str, Tensor]
) -> None:
    trunk = load_part(folder / "tiny-llama", CUT, Part.TRUNK)
    sizes = {name: p.numel() for name, p in trunk.named_parameters()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert int(shared["llama/num_weights"]) == (sum(sizes.values()) - norms) // 2 + norms
