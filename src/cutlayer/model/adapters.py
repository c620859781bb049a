"""LoRA on one part of a model, through PEFT's own layers, keyed as a standard PEFT adapter.

It does not step (`optimizer`), save (`storage`), join parts (`export`) or mix several adapters in
one call (`grouped_lora`). Keys carry global block
indices, so a state fits every cut and the states of the parts together are one PEFT adapter.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.grouped_lora import Segment, Slots
from cutlayer.model.lora_targets import find_targets, is_transposed, layer_shape
from cutlayer.model.partition import Part, PartModule
from cutlayer.settings import Settings

__all__ = [
    "Adapter",
    "AdapterSettings",
    "AdapterState",
    "attach",
    "base_only",
    "initial_state",
    "layout",
    "layout_of",
    "use_segments",
]

AdapterState = dict[str, Tensor]
"""Standard PEFT keys, `base_model.model.model.layers.{GLOBAL}.self_attn.q_proj.lora_A.weight`,
to float32 tensors on the CPU, sorted by key."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ATTRIBUTE = "cutlayer_adapters"


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
    train_a: bool = True
    """Whether factor A learns too; with A frozen the mean of factors B is the mean of updates."""
    seed: int = 0
    """Seed of the initial weights, which do not depend on the cut."""


class Adapter:
    """One named set of LoRA weights on one part; made by `attach`."""

    def __init__(self, slots: Slots, name: str, layers: Mapping[str, LoraLayer]) -> None:
        """Use `attach`."""
        self.name = name
        self._slots = slots
        self._layers = dict(layers)
        self._parameters = _parameters(name, layers)
        self._trained = {key: p for key, p in self._parameters.items() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights, sorted by their key in `state`."""
        return list(self._trained.values())

    def trained_keys(self) -> list[str]:
        """Keys of `parameters`, sorted; fewer than in `state` where factor A is frozen."""
        return list(self._trained)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable weights by their key in `state`, sorted."""
        return dict(self._parameters)

    def state(self) -> AdapterState:
        """A copy of the weights: float32, on the CPU, sorted by key."""
        return {key: value.detach().cpu().clone() for key, value in self._parameters.items()}

    def gradients(self) -> AdapterState:
        """A copy of the accumulated gradients, keyed as `state`; zero where there is none."""
        return {
            key: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu().clone()
            for key, p in self._parameters.items()
        }

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

    def deactivate(self) -> None:
        """Let the part compute as the base model until an adapter is activated."""
        self._slots.use(None)

    def remove(self) -> None:
        """Take the weights off the part; the base model stays frozen."""
        if self._slots.active == self.name:
            self._slots.use(None)
        for layer in self._layers.values():
            layer.delete_adapter(self.name)
        self._layers, self._parameters, self._trained = {}, {}, {}
        self._slots.trains_a.pop(self.name, None)

    def sq_norm(self) -> float:
        """Squared L2 norm of all gradients, summed in float64 in key order."""
        grads = [p.grad for p in self._trained.values() if p.grad is not None]
        return math.fsum(
            torch.stack([grad.double().square().sum() for grad in grads]).tolist() if grads else []
        )

    def scale_grads(self, factor: float) -> None:
        """Multiply every gradient."""
        for parameter in self._trained.values():
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
    if not _NAME.fullmatch(name) or name in slots.trains_a:
        raise ModelError(f"adapter name {name!r} is taken or malformed; choose another")
    try:
        layers = _inject(part, settings, name)
    except BaseException:  # memory may end half-way
        _take_off(part, slots, name)
        raise
    slots.trains_a[name] = settings.train_a
    _freeze_base(part, slots)
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


def use_segments(part: PartModule, segments: Sequence[Segment]) -> AbstractContextManager[None]:
    """Inside, each segment of a call's packed tokens goes through its own adapter.

    A call then has as many tokens as the segments together. Dropout of the adapters is the
    segments' own; a base model with dropout of its own must not share a call between clients,
    because its places depend on who else is in the call.
    """
    return _slots_of(part).segments(segments)


def layout(adapter: Adapter) -> dict[str, list[int]]:
    """Key -> shape of every tensor of an adapter's state, sorted by key."""
    return {key: list(value.shape) for key, value in adapter.state().items()}


def layout_of(part: PartModule, settings: AdapterSettings) -> dict[str, list[int]]:
    """What `layout` says of the adapter that `attach` would put on this part; nothing changes.

    Raises:
        ModelError: a target is no linear layer of any block.
    """
    modules = dict(part.base.named_modules())
    found = {}
    for path, name in _targets(part, settings).items():
        num_inputs, num_outputs = layer_shape(modules[name])
        found[_key(path, "A")] = [settings.rank, num_inputs]
        found[_key(path, "B")] = [num_outputs, settings.rank]
    return {key: found[key] for key in sorted(found)}


def initial_state(layout: Mapping[str, Sequence[int]], seed: int) -> AdapterState:
    """The fresh weights that `attach` draws for these keys and shapes, for any part of the model.

    Args:
        layout: key -> shape, as `layout` gives it.
        seed: `AdapterSettings.seed`.
    """
    return {key: _fresh(key, layout[key], seed) for key in sorted(layout)}


def _slots_of(part: PartModule) -> Slots:
    slots = vars(part).setdefault(_ATTRIBUTE, Slots())
    assert isinstance(slots, Slots)
    return slots


def _targets(part: PartModule, settings: AdapterSettings) -> dict[str, str]:
    return find_targets(part, settings.targets) if part.part in settings.parts else {}


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


def _inject(part: PartModule, settings: AdapterSettings, name: str) -> dict[str, LoraLayer]:
    """Put fresh weights on the layers; their paths and they themselves."""
    targets = _targets(part, settings)
    if targets:
        config = _lora_config(part, settings, targets)
        # On the meta device, because PEFT would draw weights from the global generator. Not by its
        # low_cpu_mem_usage: that changes nn.Module, and so what other threads build meanwhile.
        with torch.device("meta"):
            inject_adapter_in_model(config, part.base, name)
        # PEFT's note of what it put on warns at the next name; the layers themselves know.
        delattr(part.base, "peft_config")
    layers = _layers(part, targets)
    for path, layer in layers.items():
        _initialise(layer, name, path, settings.seed)
    return layers


def _take_off(part: PartModule, slots: Slots, name: str) -> None:
    """Remove what an `attach` that failed has put on: the others go on as before."""
    vars(part.base).pop("peft_config", None)
    before = None if slots.active == name else slots.active
    for module in part.base.modules():
        if isinstance(module, LoraLayer):
            module._active_adapter = [] if before is None else [before]
            if name in module.lora_A:
                module.delete_adapter(name)
    slots.active = before
    _freeze_base(part, slots)


def _layers(part: PartModule, targets: Mapping[str, str]) -> dict[str, LoraLayer]:
    modules = dict(part.base.named_modules())
    return {path: modules[name] for path, name in targets.items()}


def _initialise(layer: LoraLayer, name: str, path: str, seed: int) -> None:
    """Replace both factors by new tensors."""
    device = layer.get_base_layer().weight.device
    for factor, modules in (("A", layer.lora_A), ("B", layer.lora_B)):
        fresh = _fresh(_key(path, factor), modules[name].weight.shape, seed)
        modules[name].weight = nn.Parameter(fresh.to(device))


def _fresh(key: str, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform A as PEFT draws it, but seeded by the global key; B zero."""
    if key.endswith(".lora_B.weight"):
        return torch.zeros(*shape, dtype=torch.float32)
    digest = hashlib.sha256(f"{seed}|{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    # Kaiming with a = sqrt(5) is uniform within 1 / sqrt(inputs).
    drawn = torch.rand(*shape, generator=generator, dtype=torch.float32)
    return (drawn * 2 - 1) / math.sqrt(shape[-1])


def _freeze_base(part: PartModule, slots: Slots) -> None:
    """Adapters of all names stay trainable: PEFT froze the older ones for the new one."""
    for parameter in part.parameters():
        parameter.requires_grad_(False)
    slots.layers = [module for module in part.base.modules() if isinstance(module, LoraLayer)]
    for layer in slots.layers:
        layer.lora_B.requires_grad_(True)
        for name, factor in layer.lora_A.items():
            factor.requires_grad_(slots.trains_a[name])


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
