"""LoRA on a small model, masked and plain, from the same start: where do both end?

It measures no time. All three parts are in one process; only the linear layers are masked.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.subjects import write_tiny_llama
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.partition import Cut
from cutlayer.model.rows import Rows
from cutlayer.tee.masked.linear import MaskedPlace
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.part import mask_part
from cutlayer.tee.masked.settings import MaskedSettings
from cutlayer.tee.masked.sources import Pool, PoolLimits

__all__ = ["final_losses"]

_LENGTH, _VOCABULARY = 16, 256


def final_losses(folder: Path, steps: int, num_rows: int = 8) -> tuple[float, float]:
    """Mean loss of the last steps, plain and masked.

    Args:
        folder: where a tiny model is written.
        steps: optimizer steps of each run.
        num_rows: rows of a step.
    """
    model = write_tiny_llama(folder, num_blocks=4)
    plain, masked = (_train(model, steps, num_rows, is_masked) for is_masked in (False, True))
    last = max(1, steps // 10)
    return sum(plain[-last:]) / last, sum(masked[-last:]) / last


def _train(model: Path, steps: int, num_rows: int, is_masked: bool) -> Sequence[float]:
    parts = load_parts(model, Cut(1, 3))
    place = MaskedPlace(Multiplier(), Pool(PoolLimits(num_tokens=1, waits=True)))
    if is_masked:
        settings = MaskedSettings(accelerator="localhost:1", source="precompute")  # type: ignore[arg-type]
        for part in parts:
            mask_part(part, place, settings)
    adapters = [attach(part, AdapterSettings(rank=8)) for part in parts]
    weights = [weight for adapter in adapters for weight in adapter.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    head, trunk, tail = parts
    for _ in range(steps):
        tokens_N = _patterns(num_rows, generator)
        rows = Rows(lengths=(_LENGTH,) * num_rows, starts=(0,) * num_rows, tokens_N=tokens_N)
        total, count = completion_loss_sum(tail, trunk(head(rows), rows), rows, tokens_N)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float(total.detach() / count))
    place.close()
    return losses


def _patterns(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Rows that count up by a step of their own: something to learn."""
    starts = torch.randint(_VOCABULARY, (num_rows, 1), generator=generator)
    steps = torch.randint(1, 4, (num_rows, 1), generator=generator)
    return ((starts + steps * torch.arange(_LENGTH)) % _VOCABULARY).flatten()
