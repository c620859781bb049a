"""Parts of a model's shapes with made-up weights, to be counted and timed; never to be used.

It reads no weight, and what such a part computes means nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cutlayer.model.families import build_buffers
from cutlayer.model.partition import Cut, Part, PartModule, build_part

__all__ = ["blank_part"]

_WIDTH = 0.02
"""Of the made-up values: about what trained weights have, so that nothing overflows."""


def blank_part(
    config: PreTrainedConfig, part: Part, num_blocks: int, dtype: torch.dtype, seed: int | None = 0
) -> PartModule:
    """A part of so many blocks, frozen, on the CPU.

    Args:
        config: of the whole model.
        part: which part; a head's blocks are the model's first, the others' its last.
        num_blocks: fewer than the model has, for head and tail.
        dtype: of the weights.
        seed: of the values; None leaves the memory as it is.
    """
    module = build_part(config, _cut(config.num_hidden_layers, part, num_blocks), part)
    state = {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in module.state_dict().items()
    }
    if seed is not None:
        _fill(state.values(), torch.Generator().manual_seed(seed))
    module.load_state_dict(state, strict=True, assign=True)
    build_buffers(module.base, module.config, torch.device("cpu"))
    module.requires_grad_(False)
    module.eval()
    return module


def _cut(total: int, part: Part, num_blocks: int) -> Cut:
    if part is Part.HEAD:
        return Cut(num_blocks, total)
    return Cut(0, total - num_blocks) if part is Part.TAIL else Cut(total - num_blocks, total)


def _fill(tensors: Iterable[Tensor], generator: torch.Generator) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.uniform_(-_WIDTH, _WIDTH, generator=generator)
        else:
            tensor.zero_()
