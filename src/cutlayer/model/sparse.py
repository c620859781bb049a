"""SPF on one part of a model: some heads and rows of its own weights learn, the others stay frozen.

It does not choose them (`sparse_choice`) nor compute a layer (`sparse_linear`). The learnt
difference is float32 and starts at zero; the public weights are never changed, so that adapters of
several clients share them.

Shapes: N = tokens of a call, O and I = output and input features, R = rows that learn.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.adapter_kinds import KINDS, some
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapter_slots import Segment, Slots, pieces_of
from cutlayer.model.attention_heads import find_heads
from cutlayer.model.lora_targets import find_targets, is_transposed, layer_shape
from cutlayer.model.partition import PartModule
from cutlayer.model.sparse_choice import choose_rows, digest_of, row_norms
from cutlayer.model.sparse_linear import RowDelta, added_rows, is_cheaper_added, sparse_linear

__all__ = ["SPARSE_KEY", "Sparse", "SparseOnPart", "sparse_key"]

SPARSE_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.sparse_(?P<digest>[0-9a-f]{8})\.delta")
_HOLDER = "sparse_deltas"
_NORMS = "cutlayer_row_norms"


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """One layer and its rows that learn."""

    layer: nn.Module
    rows_R: Tensor
    num_inputs: int


@KINDS.register("sparse")
class Sparse:
    """Chosen heads and rows of the model's own linear layers.

    Source: Huang et al. (arXiv 2401.09796), sparsification parameter fine-tuning.
    """

    def owns(self, key: str) -> bool:
        """`PATH.sparse_DIGEST.delta`."""
        return SPARSE_KEY.fullmatch(key) is not None

    def fresh(self, key: str, shape: Sequence[int], seed: int) -> Tensor:
        """Zero: the public weights are where learning starts."""
        return torch.zeros(*shape, dtype=torch.float32)

    def layout(
        self, part: PartModule, settings: AdapterSettings, blocks: range
    ) -> dict[str, list[int]]:
        """The difference of every layer that has chosen rows."""
        return {
            key: [len(chosen.rows_R), chosen.num_inputs]
            for key, chosen in _find(part, settings, blocks)
        }

    def on(self, part: PartModule, slots: Slots) -> "SparseOnPart":
        """Layers of the part that learn in rows."""
        return SparseOnPart(part, slots)


def sparse_key(path: str, rows_R: Tensor) -> str:
    """The key of a layer's learnt difference; it tells apart different choices of rows."""
    return f"base_model.model.{path}.sparse_{digest_of(rows_R)}.delta"


class SparseOnPart:
    """All layers of one part of which some rows learn."""

    def __init__(self, part: PartModule, slots: Slots) -> None:
        self._part = part
        self._slots = slots
        self._layers: dict[nn.Module, _Layer] = {}

    def add(
        self, settings: AdapterSettings, name: str, blocks: range
    ) -> Mapping[str, nn.Parameter]:
        """Differences of zero, on the device of the layers."""
        found = {}
        for key, chosen in _find(self._part, settings, blocks):
            weight = chosen.layer.weight
            assert isinstance(weight, Tensor)
            shape = (len(chosen.rows_R), chosen.num_inputs)
            delta_RI = nn.Parameter(torch.zeros(shape, device=weight.device))
            learnt = RowDelta(delta_RI=delta_RI, rows_R=chosen.rows_R.to(weight.device))
            if chosen.layer not in self._layers:
                self._layers[chosen.layer] = _Layer(chosen.layer, self._slots)
            self._layers[chosen.layer].learnt[name] = learnt
            found[key] = delta_RI
        self._holder()[f"of_{name}"] = nn.ParameterList(found.values())
        return found

    def remove(self, name: str) -> None:
        """Take the differences off; a layer without any computes as it always did."""
        for layer in list(self._layers.values()):
            layer.learnt.pop(name, None)
            if not layer.learnt:
                layer.take_off()
                del self._layers[layer.plain]
        if f"of_{name}" in self._holder():
            del self._holder()[f"of_{name}"]

    def use(self, name: str | None) -> None:
        """Nothing: layers ask whose turn it is."""

    def share(self, segments: Sequence[Segment] | None) -> None:
        """Nothing: layers ask whose turn it is."""

    def _holder(self) -> nn.ModuleDict:
        """Where the part finds the weights among its parameters."""
        if not hasattr(self._part, _HOLDER):
            self._part.add_module(_HOLDER, nn.ModuleDict())
        holder = getattr(self._part, _HOLDER)
        assert isinstance(holder, nn.ModuleDict)
        return holder


class _Layer:
    """Stands before one layer's forward. The layer keeps its place and name in the model, so that
    LoRA goes on it, before or after, as on any other."""

    def __init__(self, plain: nn.Module, slots: Slots) -> None:
        self.plain = plain
        self.learnt: dict[str, RowDelta] = {}
        self._slots = slots
        self._num_outputs = layer_shape(plain)[1]
        self._plain_forward = type(plain).forward
        vars(plain)["forward"] = self.forward

    def take_off(self) -> None:
        """The layer's class computes again."""
        del vars(self.plain)["forward"]

    def forward(self, x: Tensor) -> Tensor:
        """The layer, with the rows of whoever's turn it is."""
        segments = self._slots.segments
        names = [self._slots.active] if segments is None else [s.adapter for s in segments]
        if len(set(names)) > 1 and not self.learnt.keys().isdisjoint(names):
            return self._shared(x, segments or [])
        learnt = self.learnt.get(names[0] or "") if len(set(names)) == 1 else None
        if learnt is None:
            return self._base(x)
        if is_cheaper_added(x.shape[:-1].numel(), learnt, self._num_outputs):
            return added_rows(self._base(x), x, learnt)
        return sparse_linear(self.plain, x, learnt)

    def _shared(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """One product for all with the weights that they share; each segment adds its own."""
        x_NI, y = x.reshape(-1, x.shape[-1]), self._base(x)
        pieces = zip(
            segments, pieces_of(x_NI, segments), pieces_of(y.flatten(0, -2), segments), strict=True
        )
        return torch.cat([self._piece(*piece) for piece in pieces]).view(y.shape)

    def _piece(self, segment: Segment, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        learnt = self.learnt.get(segment.adapter or "")
        return y_NO if learnt is None else added_rows(y_NO, x_NI, learnt)

    def _base(self, x: Tensor) -> Tensor:
        y: Tensor = self._plain_forward(self.plain, x)
        return y


def _find(
    part: PartModule, settings: AdapterSettings, blocks: range
) -> Iterator[tuple[str, _Chosen]]:
    """Key and rows of every layer of these blocks that learns."""
    if part.part not in settings.parts:
        return
    targets = find_targets(part, settings.targets, blocks)
    modules = part.base.get_submodule(part.layout.blocks)
    for index, block in enumerate(modules.children()):
        if part.block_range[index] not in blocks:
            continue
        prefix = f"{part.layout.blocks}.{index}."
        paths = {n.removeprefix(prefix): p for p, n in targets.items() if n.startswith(prefix)}
        layers = {name: _plain(block.get_submodule(name), paths[name]) for name in paths}
        yield from _chosen_of(part, block, paths, layers, settings)


def _chosen_of(
    part: PartModule,
    block: nn.Module,
    paths: Mapping[str, str],
    layers: Mapping[str, nn.Module],
    settings: AdapterSettings,
) -> Iterator[tuple[str, _Chosen]]:
    heads = find_heads(block, part.config)
    if heads is None and settings.sparse.qkv_ratio:
        raise ModelError(
            f"sparse: {part.config.model_type} keeps its attention heads in none of the usual "
            f"ways ({some(sorted(layers))}); set adapter.sparse.qkv_ratio = 0, and its attention "
            "layers count as dense"
        )

    def norms(name: str) -> Tensor:
        return _norms_of(part, _plain(block.get_submodule(name), name))

    chosen = choose_rows(layers.keys(), heads, norms, settings.sparse)
    for name, rows_R in chosen.items():
        num_inputs = layer_shape(layers[name])[0]
        found = _Chosen(layer=layers[name], rows_R=rows_R, num_inputs=num_inputs)
        yield sparse_key(paths[name], rows_R), found


def _norms_of(part: PartModule, layer: nn.Module) -> Tensor:
    """L1 norm of every row of a layer, kept with the part: a server is asked by many clients."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    known: dict[nn.Module, tuple[tuple[int, int], Tensor]] = vars(part).setdefault(_NORMS, {})
    version = (weight.data_ptr(), weight._version)
    if layer not in known or known[layer][0] != version:
        known[layer] = version, row_norms(weight, is_transposed(layer))
    return known[layer][1]


def _plain(layer: nn.Module, path: str) -> nn.Module:
    """The layer below LoRA, whose own weight is to learn.

    Raises:
        ModelError: its weight is quantised, shared out or not there.
    """
    base = getattr(layer, "base_layer", layer)
    assert isinstance(base, nn.Module)
    weight = base.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise ModelError(f"sparse: {path} is quantised ({weight.dtype}); train lora on it instead")
    inputs, outputs = layer_shape(base)
    if sorted(weight.shape) != sorted((inputs, outputs)):
        raise ModelError(
            f"sparse: {path} is shared out among processes, so its rows cannot learn; train lora, "
            "or serve the trunk with one process"
        )
    if weight.is_meta:
        raise ModelError(f"sparse: {path} has no weights yet; load the model first")
    return base
