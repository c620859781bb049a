"""Which linear layers of a part an adapter goes on, by PEFT's rule for names.

It does not put anything on them (`adapters`). Paths are those of the unsplit model, so that one
setting means the same layers at every cut.
"""

from collections.abc import Iterable, Sequence

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import ModelError
from cutlayer.model.families import meta_model
from cutlayer.model.partition import PartModule

__all__ = ["find_targets", "is_transposed", "layer_shape", "linear_layers"]

_LINEAR = (nn.Linear, Conv1D)
_INSIDE_LORA = frozenset({"base_layer", "lora_A", "lora_B"})


def find_targets(part: PartModule, patterns: str | Sequence[str], blocks: range) -> dict[str, str]:
    """Global path of every layer to adapt -> its name within the part's base model.

    Args:
        part: Head, Trunk or Tail.
        patterns: "all-linear", or names of which one must end a layer's path.
        blocks: global indices of the blocks to look into.

    Raises:
        ModelError: a pattern fits no linear layer of any block of the whole model.
    """
    places = {index: str(place) for place, index in enumerate(part.block_range)}
    wanted = {places[index] for index in blocks}
    names = _linear_names(part.base, part.layout.blocks)
    chosen = [name for name in names if name.split(".")[1] in wanted]
    paths = {part.global_name(f"base.{name}"): name for name in chosen}
    if patterns == "all-linear" or not paths:
        return paths
    assert not isinstance(patterns, str)
    _check_patterns(part, patterns, paths)
    return {path: name for path, name in paths.items() if _matches(path, patterns)}


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a linear layer, adapted or not."""
    base = layer.base_layer if isinstance(layer, LoraLayer) else layer
    assert isinstance(base.weight, Tensor)
    if isinstance(base, nn.Linear):
        # Not its weight's shape: a rank of a shared trunk has only some rows or columns.
        return base.in_features, base.out_features
    first, second = base.weight.shape
    return (int(first), int(second)) if is_transposed(base) else (int(second), int(first))


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, adapted or not, of all that a module has."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (*_LINEAR, LoraLayer)) and not _INSIDE_LORA & set(name.split("."))
    }


def is_transposed(base: nn.Module) -> bool:
    """Whether a layer keeps its weight as [inputs, outputs], as GPT-2 does."""
    return isinstance(base, Conv1D)


def _linear_names(base: nn.Module, blocks: str) -> list[str]:
    """Names, within a base model, of every linear layer inside a block."""
    return [name for name in linear_layers(base) if name.startswith(f"{blocks}.")]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """PEFT's rule for a list of target modules."""
    return any(path == pattern or path.endswith(f".{pattern}") for pattern in patterns)


def _check_patterns(part: PartModule, patterns: Sequence[str], paths: Iterable[str]) -> None:
    """Refuse a pattern that fits no block of the whole model; not every part needs to have it."""
    unused = [pattern for pattern in patterns if not any(_matches(p, [pattern]) for p in paths)]
    if not unused:
        return
    prefix, blocks = part.layout.prefix, part.layout.blocks
    whole = getattr(meta_model(part.config), prefix)
    known = [f"{prefix}.{name}" for name in _linear_names(whole, blocks)]
    wrong = [pattern for pattern in unused if not any(_matches(p, [pattern]) for p in known)]
    if wrong:
        names = sorted({path.rpartition(".")[2] for path in known})
        raise ModelError(f"adapter.targets {wrong} fit no linear layer of a block; known: {names}")
