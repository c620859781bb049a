"""P-tuning v2 on one part of a model: trained keys and values before the rows, block by block.

It does not attend (`attention`) nor place them (`row_prefix`). A part holds the vectors of its own
blocks; joined, those of all parts are PEFT's PREFIX_TUNING without a projection.

Shapes: P = vectors per block, H = key-value heads, E = width of a head.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.adapter_kinds import KINDS, generator_of
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapter_slots import Segment, Slots
from cutlayer.model.attention_heads import Heads, find_heads
from cutlayer.model.partition import PartModule
from cutlayer.model.row_prefix import RowPrefix
from cutlayer.model.rows import Rows

__all__ = ["PREFIX_KEY", "Prefix", "PrefixOnPart"]

PREFIX_KEY = re.compile(r"base_model\.model\.(?P<blocks>.+)\.(?P<block>\d+)\.prefix_(key|value)")
"""Of the keys, or the values, of one block, [P, H * E]."""

_HOLDER = "prefix_vectors"
_INITIAL_STD = 0.02
"""Small against what models compute, so that training starts near the base model."""


@KINDS.register("prefix")
class Prefix:
    """Trained keys and values that every token of a row may attend to, in every block.

    Source: Liu et al., P-Tuning v2 (arXiv 2110.07602), section 3.2, without reparameterisation;
    Li and Liang, Prefix-Tuning (arXiv 2101.00190), section 4.2.
    """

    def owns(self, key: str) -> bool:
        """`BLOCKS.INDEX.prefix_key` and `.prefix_value`."""
        return PREFIX_KEY.fullmatch(key) is not None

    def fresh(self, key: str, shape: Sequence[int], seed: int) -> Tensor:
        """Small normal values, seeded by the global key."""
        drawn = torch.randn(*shape, generator=generator_of(key, seed), dtype=torch.float32)
        return drawn * _INITIAL_STD

    def layout(
        self, part: PartModule, settings: AdapterSettings, blocks: range
    ) -> dict[str, list[int]]:
        """Keys and values of every block."""
        _check_context(part, settings)
        if part.part not in settings.parts or not blocks:
            return {}
        heads, num_vectors = _heads_of(part), settings.prefix.num_virtual_tokens
        shape = [num_vectors, heads.num_kv_heads * heads.width]
        return {_key(part, b, what): shape for b in blocks for what in ("key", "value")}

    def on(self, part: PartModule, slots: Slots) -> "PrefixOnPart":
        """The part's prefixes."""
        return PrefixOnPart(part, slots)


class PrefixOnPart:
    """All prefixes on one part; the part asks for them in every call."""

    def __init__(self, part: PartModule, slots: Slots) -> None:
        self._part = part
        self._slots = slots
        self._lengths: dict[str, int] = {}
        self._vectors: dict[str, dict[int, tuple[nn.Parameter, nn.Parameter]]] = {}
        self._width = 1
        part.prefixes = self

    def add(
        self, settings: AdapterSettings, name: str, blocks: range
    ) -> Mapping[str, nn.Parameter]:
        """Fresh vectors on the device of the part's weights.

        A part that does not train has none, but counts positions from the first vector too.
        """
        kind = KINDS.get("prefix")
        device = next(self._part.parameters()).device
        found = {
            key: nn.Parameter(kind.fresh(key, shape, settings.seed).to(device))
            for key, shape in kind.layout(self._part, settings, blocks).items()
        }
        self._holder()[f"of_{name}"] = nn.ParameterList(found.values())
        places = {index: place for place, index in enumerate(self._part.block_range)}
        self._vectors[name] = {
            places[b]: (found[_key(self._part, b, "key")], found[_key(self._part, b, "value")])
            for b in (blocks if found else ())
        }
        self._lengths[name] = settings.prefix.num_virtual_tokens
        self._width = _heads_of(self._part).width if found else self._width
        return found

    def remove(self, name: str) -> None:
        """Rows of this adapter, if any come, have no prefix."""
        self._lengths.pop(name, None)
        self._vectors.pop(name, None)
        if f"of_{name}" in self._holder():
            del self._holder()[f"of_{name}"]

    def use(self, name: str | None) -> None:
        """Nothing: the part asks whose turn it is."""

    def share(self, segments: Sequence[Segment] | None) -> None:
        """Nothing: the part asks whose turn it is."""

    def of_rows(self, rows: Rows) -> list[RowPrefix | None]:
        """The prefix of whoever's turn it is, per row; one object per adapter."""
        if not self._lengths:
            return [None] * rows.num_rows
        names = self._slots.adapters_of(rows)
        made = {name: self._prefix(name) for name in set(names)}
        return [made[name] for name in names]

    def weights(self) -> Iterator[nn.Parameter]:
        """All vectors of all adapters."""
        pairs = itertools.chain.from_iterable(v.values() for v in self._vectors.values())
        return itertools.chain.from_iterable(pairs)

    def _prefix(self, name: str | None) -> RowPrefix | None:
        if name is None or name not in self._lengths:
            return None
        num_vectors = self._lengths[name]
        split = (num_vectors, -1, self._width)
        vectors = self._vectors[name].items()
        states = {
            place: (keys.view(split), values.view(split)) for place, (keys, values) in vectors
        }
        return RowPrefix(num_vectors, states, self._part.own_heads)

    def _holder(self) -> nn.ModuleDict:
        """Where the part finds the vectors among its parameters."""
        if not hasattr(self._part, _HOLDER):
            self._part.add_module(_HOLDER, nn.ModuleDict())
        holder = getattr(self._part, _HOLDER)
        assert isinstance(holder, nn.ModuleDict)
        return holder


def _key(part: PartModule, block: int, what: str) -> str:
    """By the block's global index."""
    place = part.block_range.index(block)
    path = part.global_name(f"base.{part.layout.blocks}.{place}.prefix_{what}")
    return f"base_model.model.{path}"


def _check_context(part: PartModule, settings: AdapterSettings) -> None:
    context = getattr(part.config, "max_position_embeddings", None)
    num_vectors = settings.prefix.num_virtual_tokens
    if context is not None and num_vectors >= context:
        raise ModelError(
            f"adapter.prefix.num_virtual_tokens={num_vectors} leaves no room in the model's "
            f"context of {context}; choose fewer"
        )


def _heads_of(part: PartModule) -> Heads:
    """The heads of the part's blocks, which are alike."""
    found = [
        find_heads(b, part.config) for b in part.base.get_submodule(part.layout.blocks).children()
    ]
    heads = found[0]
    if heads is None or any(other is None for other in found):
        raise ModelError(
            f"prefix: {part.config.model_type} does not keep keys and values of one width in "
            "every block; train lora or sparse instead"
        )
    return heads
