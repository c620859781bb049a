"""Where a block's attention keeps its heads: which rows of which linear layers.

It does not choose heads (`sparse_choice`). A row is what makes one output of a layer: a row of
[outputs, inputs] as linear layers keep their weight, a column of [inputs, outputs] as GPT-2 does.

Shapes: H = query heads, G = key-value heads, E = width of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from cutlayer.model.lora_targets import layer_shape, linear_layers

__all__ = ["Heads", "find_heads"]

_SPLIT = ("q_proj", "k_proj", "v_proj")
_ONE_AFTER_THE_OTHER = frozenset({"c_attn", "qkv_proj"})
"""Fused layers: all queries, then all keys, then all values."""
_HEAD_BY_HEAD = "query_key_value"
"""Fused layer: query, key and value of the first head, of the second..."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one block."""

    num_kv_heads: int
    """G."""
    width: int
    """E, of queries, keys and values alike."""
    groups: Sequence[Mapping[str, Sequence[range]]]
    """Of each key-value head with its query heads: layer's name within the block -> its rows."""

    @property
    def layers(self) -> set[str]:
        """Names, within the block, of the layers that have heads."""
        return set(self.groups[0])


def find_heads(block: nn.Module, config: PreTrainedConfig) -> Heads | None:
    """The heads of a block; None where its attention is none of the usual ones.

    Args:
        block: one of a model's blocks, with adapters or without.
        config: of the model.
    """
    layers = linear_layers(block)
    # A rank of a shared trunk has a wrapper around its share of a layer.
    by_name = {name.removesuffix(".inner").rpartition(".")[2]: name for name in layers}
    num_heads = int(config.num_attention_heads)
    num_kv = int(getattr(config, "num_key_value_heads", None) or num_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    for shape in (_split, _one_after_the_other, _head_by_head):
        rows = shape(by_name, num_heads // num_kv, num_kv, width)
        if rows is not None and _covers(rows, layers):
            return Heads(num_kv_heads=num_kv, width=width, groups=rows)
    return None


_Rows = list[dict[str, list[range]]]


def _split(names: Mapping[str, str], per_group: int, num_kv: int, width: int) -> _Rows | None:
    if not set(_SPLIT) <= names.keys():
        return None
    query, key, value = (names[name] for name in _SPLIT)
    return [
        {
            query: [_span(group, per_group * width)],
            key: [_span(group, width)],
            value: [_span(group, width)],
        }
        for group in range(num_kv)
    ]


def _one_after_the_other(
    names: Mapping[str, str], per_group: int, num_kv: int, width: int
) -> _Rows | None:
    fused = [name for short, name in names.items() if short in _ONE_AFTER_THE_OTHER]
    if len(fused) != 1:
        return None
    (name,) = fused
    keys = num_kv * per_group * width
    values = keys + num_kv * width
    return [
        {
            name: [
                _span(group, per_group * width),
                _span(group, width, keys),
                _span(group, width, values),
            ]
        }
        for group in range(num_kv)
    ]


def _head_by_head(
    names: Mapping[str, str], per_group: int, num_kv: int, width: int
) -> _Rows | None:
    if _HEAD_BY_HEAD not in names or per_group != 1:
        return None
    return [{names[_HEAD_BY_HEAD]: [_span(head, 3 * width)]} for head in range(num_kv)]


def _span(index: int, size: int, start: int = 0) -> range:
    return range(start + index * size, start + (index + 1) * size)


def _covers(groups: _Rows, layers: Mapping[str, nn.Module]) -> bool:
    """Whether the groups' rows are all that their layers have."""
    return all(
        sum(len(span) for group in groups for span in group[name]) == layer_shape(layers[name])[1]
        for name in groups[0]
    )
