"""LoRA on one part of a model, through PEFT's own layers, keyed as a standard PEFT adapter.

It does not choose layers (`lora_targets`) nor mix several adapters in one call (`grouped_lora`).
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.adapter_kinds import KINDS, generator_of, some
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapter_slots import Segment, Slots
from cutlayer.model.grouped_lora import SharedLora
from cutlayer.model.lora_targets import find_targets, is_transposed, layer_shape
from cutlayer.model.partition import PartModule

__all__ = ["Lora", "LoraOnPart"]

_KEY = re.compile(r".+\.lora_[AB]\.weight")


@KINDS.register("lora")
class Lora:
    """Low-rank updates of linear layers.

    Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1.
    """

    def owns(self, key: str) -> bool:
        """PEFT's names of its two factors."""
        return _KEY.fullmatch(key) is not None

    def fresh(self, key: str, shape: Sequence[int], seed: int) -> Tensor:
        """Uniform A as PEFT draws it, but seeded by the global key; B zero."""
        if key.endswith(".lora_B.weight"):
            return torch.zeros(*shape, dtype=torch.float32)
        # Kaiming with a = sqrt(5) is uniform within 1 / sqrt(inputs).
        drawn = torch.rand(*shape, generator=generator_of(key, seed), dtype=torch.float32)
        return (drawn * 2 - 1) / math.sqrt(shape[-1])

    def layout(
        self, part: PartModule, settings: AdapterSettings, blocks: range
    ) -> dict[str, list[int]]:
        """Both factors of every target."""
        modules = dict(part.base.named_modules())
        found = {}
        for path, name in _targets(part, settings, blocks).items():
            num_inputs, num_outputs = layer_shape(modules[name])
            found[_key(path, "A")] = [settings.rank, num_inputs]
            found[_key(path, "B")] = [num_outputs, settings.rank]
        return found

    def on(self, part: PartModule, slots: Slots) -> "LoraOnPart":
        """PEFT's layers on the part."""
        return LoraOnPart(part, slots)


class LoraOnPart:
    """All LoRA layers of one part."""

    def __init__(self, part: PartModule, slots: Slots) -> None:
        self._part = part
        self._slots = slots
        self._shared = SharedLora()
        self._layers: list[LoraLayer] = []
        self._by_name: dict[str, list[LoraLayer]] = {}

    def add(
        self, settings: AdapterSettings, name: str, blocks: range
    ) -> Mapping[str, nn.Parameter]:
        """Inject PEFT's layers and give them fresh weights."""
        self._by_name[name] = []
        layers = _inject(self._part, settings, name, blocks)
        for path, layer in layers.items():
            _initialise(layer, name, path, settings)
        self._by_name[name] = list(layers.values())
        self._find_layers()
        return _parameters(name, layers)

    def remove(self, name: str) -> None:
        """Take the factors off; of a failed `add`, whatever it has left."""
        if name not in self._by_name:
            return
        layers = self._by_name.pop(name)
        # Where another kind failed, PEFT's own choice of the active one still stands.
        self.use(self._slots.active)
        for layer in layers:
            layer.delete_adapter(name)
        if not layers:
            self._remove_rest(name)

    def use(self, name: str | None) -> None:
        """Let PEFT's own forward use one adapter, or none."""
        for layer in self._layers:
            # PEFT's set_adapter also takes requires_grad from the others: a graph that was built
            # for one of them would then lose its gradient without an error.
            layer._active_adapter = [] if name is None else [name]

    def share(self, segments: Sequence[Segment] | None) -> None:
        """Each segment adds the update of its own adapter."""
        self._shared.begin(segments, self._layers)

    def _remove_rest(self, name: str) -> None:
        vars(self._part.base).pop("peft_config", None)
        self._find_layers()
        self.use(self._slots.active)
        for layer in self._layers:
            if name in layer.lora_A:
                layer.delete_adapter(name)

    def _find_layers(self) -> None:
        self._layers = [m for m in self._part.base.modules() if isinstance(m, LoraLayer)]


def _targets(part: PartModule, settings: AdapterSettings, blocks: range) -> dict[str, str]:
    return find_targets(part, settings.targets, blocks) if part.part in settings.parts else {}


def _lora_config(
    part: PartModule, settings: AdapterSettings, targets: Mapping[str, str]
) -> LoraConfig:
    modules = dict(part.base.named_modules())
    layers = [modules[name] for name in targets.values()]
    bases = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers]
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # One pattern of whole names: suffixes would also find layers outside the blocks.
        target_modules="|".join(re.escape(name) for name in targets.values()),
        fan_in_fan_out=any(is_transposed(base) for base in bases),
    )


def _inject(
    part: PartModule, settings: AdapterSettings, name: str, blocks: range
) -> dict[str, LoraLayer]:
    """Put empty factors on the layers; their paths and they themselves."""
    targets = _targets(part, settings, blocks)
    if targets:
        config = _lora_config(part, settings, targets)
        # On the meta device, because PEFT would draw weights from the global generator. Not by its
        # low_cpu_mem_usage: that changes nn.Module, and so what other threads build meanwhile.
        with torch.device("meta"):
            inject_adapter_in_model(config, part.base, name)
        # PEFT's note of what it put on warns at the next name; the layers themselves know.
        delattr(part.base, "peft_config")
    modules = dict(part.base.named_modules())
    missed = [path for path, name in targets.items() if not isinstance(modules[name], LoraLayer)]
    if missed:
        raise ModelError(
            f"PEFT puts no LoRA on {some(missed)} of {part.config.model_type}; name other layers "
            "in adapter.targets"
        )
    return {path: modules[name] for path, name in targets.items()}


def _initialise(layer: LoraLayer, name: str, path: str, settings: AdapterSettings) -> None:
    """Replace both factors by new tensors."""
    device = layer.get_base_layer().weight.device
    for factor, modules in (("A", layer.lora_A), ("B", layer.lora_B)):
        shape = modules[name].weight.shape
        fresh = KINDS.get("lora").fresh(_key(path, factor), shape, settings.seed)
        learns = factor == "B" or settings.train_a
        modules[name].weight = nn.Parameter(fresh.to(device), requires_grad=learns)


def _parameters(name: str, layers: Mapping[str, LoraLayer]) -> dict[str, nn.Parameter]:
    found = {}
    for path, layer in layers.items():
        found[_key(path, "A")] = layer.lora_A[name].weight
        found[_key(path, "B")] = layer.lora_B[name].weight
    return found


def _key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"
