"""LoRA on one part of a model, through PEFT's own layers, keyed as a standard PEFT adapter.

It does not step (`optimizer`), save (`storage`) or join parts (`export`). Keys carry global block
indices, so a state fits every cut and the states of the parts together are one PEFT adapter.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import ModelError
from cutlayer.model.families import meta_model
from cutlayer.model.partition import Part, PartModule
from cutlayer.settings import Settings

__all__ = ["Adapter", "AdapterSettings", "AdapterState", "attach", "base_only"]

AdapterState = dict[str, Tensor]
"""Standard PEFT keys, `base_model.model.model.layers.{GLOBAL}.self_attn.q_proj.lora_A.weight`,
to float32 tensors on the CPU, sorted by key."""

_LINEAR = (nn.Linear, Conv1D)
_INSIDE_LORA = frozenset({"base_layer", "lora_A", "lora_B"})
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SLOTS = "cutlayer_adapters"


class AdapterSettings(Settings):
    """What is trained."""

    kind: Literal["lora"] = "lora"
    """LoRA (Hu et al., arXiv 2106.09685)."""
    rank: int = Field(default=8, ge=1)
    """Inner dimension of the two factors."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is dropped in training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers of the blocks: all linear ones, or those whose name ends with one of these."""
    parts: list[Part] = Field(default=[Part.HEAD, Part.TRUNK, Part.TAIL])
    """Which parts are trained; the others stay frozen."""
    seed: int = 0
    """Seed of the initial weights, which do not depend on the cut."""


@dataclass
class _Slots:
    """All LoRA layers of one part, and whose adapter is in use on them."""

    layers: list[LoraLayer] = field(default_factory=list)
    active: str | None = None

    names: set[str] = field(default_factory=set)

    def use(self, name: str | None) -> None:
        if name == self.active:
            return
        self.active = name
        for layer in self.layers:
            # PEFT's set_adapter also takes requires_grad from the others: a graph that was built
            # for one of them would then lose its gradient without an error.
            layer._active_adapter = [] if name is None else [name]


class Adapter:
    """One named set of LoRA weights on one part; made by `attach`."""

    def __init__(self, slots: _Slots, name: str, layers: Mapping[str, LoraLayer]) -> None:
        """Use `attach`."""
        self.name = name
        self._slots = slots
        self._layers = dict(layers)
        self._parameters = _parameters(name, layers)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights, sorted by their key in `state`."""
        return list(self._parameters.values())

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable weights by their key in `state`, sorted."""
        return dict(self._parameters)

    def state(self) -> AdapterState:
        """A copy of the weights: float32, on the CPU, sorted by key."""
        return {key: value.detach().cpu().clone() for key, value in self._parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights; all are checked before the first is changed.

        Raises:
            ModelError: a key is missing or unknown, or a shape differs.
        """
        missing = sorted(self._parameters.keys() - state.keys())
        extra = sorted(state.keys() - self._parameters.keys())
        if missing or extra:
            raise ModelError(
                f"adapter state does not fit: missing {_some(missing)}, unknown {_some(extra)}; "
                "were the cut, the targets or the model changed?"
            )
        for key, parameter in self._parameters.items():
            if state[key].shape != parameter.shape:
                shapes = f"{tuple(state[key].shape)}, here {tuple(parameter.shape)}"
                raise ModelError(f"adapter state {key} is {shapes}; was the rank changed?")
        with torch.no_grad():
            for key, parameter in self._parameters.items():
                parameter.copy_(state[key])

    def activate(self) -> None:
        """Use this adapter, and no other, in the part's next forward."""
        self._slots.use(self.name)

    def remove(self) -> None:
        """Take the weights off the part; the base model stays frozen."""
        if self._slots.active == self.name:
            self._slots.use(None)
        for layer in self._layers.values():
            layer.delete_adapter(self.name)
        self._layers, self._parameters = {}, {}
        self._slots.names.discard(self.name)

    def sq_norm(self) -> float:
        """Squared L2 norm of all gradients, summed in float64 in key order."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        return math.fsum(
            torch.stack([grad.double().square().sum() for grad in grads]).tolist() if grads else []
        )

    def scale_grads(self, factor: float) -> None:
        """Multiply every gradient."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def attach(part: PartModule, settings: AdapterSettings, name: str = "default") -> Adapter:
    """Freeze a part and put fresh LoRA weights on it; the new adapter is active.

    A part without blocks, or one that `settings.parts` leaves out, gets an adapter without weights.

    Args:
        part: Head, Trunk or Tail.
        settings: what is trained.
        name: tells several adapters of one part apart; letters, digits, "_" and "-".

    Raises:
        ModelError: the name is taken or malformed, or a target is no linear layer of any block.
    """
    slots = _slots_of(part)
    if not _NAME.fullmatch(name) or name in slots.names:
        raise ModelError(f"adapter name {name!r} is taken or malformed; choose another")
    targets = _targets(part, settings)
    if targets:
        config = _lora_config(part, settings, targets)
        # On the meta device, because PEFT would draw weights from the global generator.
        inject_adapter_in_model(config, part.base, name, low_cpu_mem_usage=True)
        # PEFT's note of what it put on warns at the next name; the layers themselves know.
        delattr(part.base, "peft_config")
    layers = _layers(part, targets)
    for path, layer in layers.items():
        _initialise(layer, name, path, settings.seed)
    _freeze_base(part, slots)
    slots.names.add(name)
    slots.active = None
    slots.use(name)
    # Fresh dropout layers start in training mode, whatever the part is in.
    part.train(part.training)
    return Adapter(slots, name, layers)


@contextmanager
def base_only(part: PartModule) -> Iterator[None]:
    """Inside, the part computes as the base model; afterwards the same adapter is active again."""
    slots = _slots_of(part)
    before = slots.active
    slots.use(None)
    try:
        yield
    finally:
        slots.use(before)


def _slots_of(part: PartModule) -> _Slots:
    slots = vars(part).setdefault(_SLOTS, _Slots())
    assert isinstance(slots, _Slots)
    return slots


def _targets(part: PartModule, settings: AdapterSettings) -> dict[str, str]:
    """Global path of every layer to adapt -> its name within the part's base model."""
    if part.part not in settings.parts:
        return {}
    names = _linear_names(part.base, part.layout.blocks)
    paths = {part.global_name(f"base.{name}"): name for name in names}
    if settings.targets == "all-linear" or not paths:
        return paths
    _check_patterns(part, settings.targets, paths)
    return {path: name for path, name in paths.items() if _matches(path, settings.targets)}


def _linear_names(base: nn.Module, blocks: str) -> list[str]:
    """Names, within a base model, of every linear layer inside a block."""
    return [
        name
        for name, module in base.named_modules()
        if name.startswith(f"{blocks}.")
        and not _INSIDE_LORA & set(name.split("."))
        and isinstance(module, (*_LINEAR, LoraLayer))
    ]


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
        fan_in_fan_out=any(isinstance(base, Conv1D) for base in bases),
    )


def _layers(part: PartModule, targets: Mapping[str, str]) -> dict[str, LoraLayer]:
    modules = dict(part.base.named_modules())
    return {path: modules[name] for path, name in targets.items()}


def _initialise(layer: LoraLayer, name: str, path: str, seed: int) -> None:
    """Uniform A as PEFT draws it, but seeded by the global path; B zero. Both are new tensors."""
    device = layer.get_base_layer().weight.device
    rank, in_features = layer.lora_A[name].weight.shape
    digest = hashlib.sha256(f"{seed}|{_key(path, 'A')}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    # Kaiming with a = sqrt(5) is uniform within 1 / sqrt(in_features).
    a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)
    b = torch.zeros(layer.lora_B[name].weight.shape)
    layer.lora_A[name].weight = nn.Parameter(a.to(device))
    layer.lora_B[name].weight = nn.Parameter(b.to(device))


def _freeze_base(part: PartModule, slots: _Slots) -> None:
    """Adapters of all names stay trainable: PEFT froze the older ones for the new one."""
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    slots.layers = [module for module in part.base.modules() if isinstance(module, LoraLayer)]
    for layer in slots.layers:
        for factors in (layer.lora_A, layer.lora_B):
            factors.requires_grad_(True)


def _parameters(name: str, layers: Mapping[str, LoraLayer]) -> dict[str, nn.Parameter]:
    found = {}
    for path, layer in layers.items():
        found[_key(path, "A")] = layer.lora_A[name].weight
        found[_key(path, "B")] = layer.lora_B[name].weight
    return {key: found[key] for key in sorted(found)}


def _key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
