"""Sizes of a model's pieces, from its config alone: no weight is read or downloaded.

It does not know cuts, memory of a process or time.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from cutlayer.errors import ModelError
from cutlayer.model.adapters import AdapterSettings, layout_of
from cutlayer.model.checkpoint import DTYPES
from cutlayer.model.families import meta_model, read_layout
from cutlayer.model.manifest import leaf_of
from cutlayer.model.partition import Cut, Part, build_part

__all__ = ["ModelShapes", "read_shapes"]

_BLOCK = re.compile(r"block\.(\d+)")


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """What every prediction is made from."""

    config: PreTrainedConfig
    """Of the whole model."""
    num_blocks: int
    hidden_size: int
    vocab_size: int
    dtype: str
    """Compute type of the weights."""
    is_tied: bool
    """Whether the LM head is the embedding."""
    block_bytes: tuple[int, ...]
    """Weights of each block."""
    embedding_bytes: int
    norm_bytes: int
    """Final norm, and whatever else is in no block."""
    lm_head_bytes: int
    """0 where it is the embedding."""
    largest_tensor_bytes: int
    """Of all tensors: what a load holds twice for a moment."""
    adapter_values: tuple[int, ...]
    """Weights of the adapter on each block, all of which train."""

    def blocks_bytes(self, blocks: range) -> int:
        """Weights of some blocks."""
        return sum(self.block_bytes[index] for index in blocks)

    def adapter_bytes(self, blocks: range) -> int:
        """Adapter of some blocks, float32."""
        return 4 * sum(self.adapter_values[index] for index in blocks)


def read_shapes(config: PreTrainedConfig, dtype: str, adapter: AdapterSettings) -> ModelShapes:
    """Sizes of a model with an adapter.

    Args:
        config: of the whole model.
        dtype: compute type.
        adapter: what is trained, wherever it lies.

    Raises:
        ModelError: the model cannot be cut, or the adapter does not fit it.
    """
    if "sparse" in adapter.kinds:
        raise ModelError(
            "the rows of adapter.kinds sparse are chosen by the weights, which a plan does not "
            'read; plan with adapter.kinds = ["lora"] in its place'
        )
    model = meta_model(config)
    read_layout(model)
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    num_blocks = int(model.config.num_hidden_layers)
    if num_blocks < 1:
        raise ModelError(f"the {config.model_type} has no blocks, so there is nothing to cut")
    size = DTYPES[dtype].itemsize
    leaves = _values_by_leaf(model)
    return ModelShapes(
        config=config,
        num_blocks=num_blocks,
        hidden_size=int(model.config.hidden_size),
        vocab_size=int(model.config.vocab_size),
        dtype=dtype,
        is_tied=is_tied,
        block_bytes=tuple(size * leaves.get(f"block.{i}", 0) for i in range(num_blocks)),
        embedding_bytes=size * leaves.get("embedding", 0),
        norm_bytes=size * leaves.get("norm", 0),
        lm_head_bytes=0 if is_tied else size * leaves.get("lm_head", 0),
        largest_tensor_bytes=size * max(tensor.numel() for tensor in model.state_dict().values()),
        adapter_values=_adapter_values(config, adapter, num_blocks),
    )


def _values_by_leaf(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        leaf = leaf_of(name)
        found[leaf] = found.get(leaf, 0) + tensor.numel()
    return found


def _adapter_values(
    config: PreTrainedConfig, adapter: AdapterSettings, num_blocks: int
) -> tuple[int, ...]:
    """All blocks as one trunk that trains, wherever they will lie."""
    part = build_part(config, Cut(0, num_blocks), Part.TRUNK)
    everywhere = adapter.model_copy(update={"parts": list(Part)})
    found = [0] * num_blocks
    for key, shape in layout_of(part, everywhere).items():
        block = _BLOCK.fullmatch(leaf_of(key))
        if block is not None:
            found[int(block[1])] += torch.Size(shape).numel()
    return tuple(found)
