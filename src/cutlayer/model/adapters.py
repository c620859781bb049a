"""Adapters of one part of a model, of one kind or of several together, under standard PEFT keys.

It does not step (`optimizer`), save (`storage`), join parts (`export`) nor know what a kind is
(`lora`, `prefix`, `sparse`). Keys carry global block indices, so a state fits every cut and the
states of the parts together are one adapter of the whole model.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.adapter_kinds import KINDS, AdapterKind, some
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapter_slots import Segment, Slots, slots_of
from cutlayer.model.lora import Lora
from cutlayer.model.partition import PartModule
from cutlayer.model.prefix import Prefix
from cutlayer.model.sparse import Sparse

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
# Importing a kind registers it.
assert [type(KINDS.get(name)) for name in KINDS] == [Lora, Prefix, Sparse]


class Adapter:
    """One named set of weights on one part; made by `attach`.

    Attributes:
        name: tells it from others on the part.
        kinds: what it consists of, sorted.
    """

    def __init__(self, slots: Slots, name: str) -> None:
        """Use `attach`."""
        self.name = name
        self.kinds: list[str] = list(slots.settings[name].kinds)
        self._slots = slots
        self._parameters = slots.weights(name)
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
                f"adapter state does not fit: missing {some(missing)}, unknown {some(extra)}; "
                "were the cut, the kinds, the targets or the model changed?"
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
        self._slots.take_off(self.name)
        self._parameters, self._trained = {}, {}

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


def attach(
    part: PartModule,
    settings: AdapterSettings,
    name: str = "default",
    blocks: range | None = None,
) -> Adapter:
    """Freeze a part and put fresh weights on it; the new adapter is active.

    A part without blocks, or one that `settings.parts` leaves out, gets an adapter without weights.

    Args:
        part: Head, Trunk or Tail.
        settings: what is trained.
        name: tells several adapters of one part apart; letters, digits, "_" and "-".
        blocks: global indices of the part's blocks that get weights; None is all.

    Raises:
        ModelError: the name is taken or malformed, a target is no linear layer of any block, or
            the architecture does not fit a kind.
    """
    slots = slots_of(part)
    if not _NAME.fullmatch(name) or name in slots.settings:
        raise ModelError(f"adapter name {name!r} is taken or malformed; choose another")
    try:
        chosen = part.block_range if blocks is None else blocks
        slots.put_on(name, settings, chosen, lambda kind: KINDS.get(kind).on(part, slots))
    except BaseException:  # memory may end half-way
        slots.take_off(name)
        slots.freeze(part)
        raise
    slots.freeze(part)
    slots.active = None
    slots.use(name)
    # Fresh dropout layers start in training mode, whatever the part is in.
    part.train(part.training)
    return Adapter(slots, name)


@contextmanager
def base_only(part: PartModule) -> Iterator[None]:
    """Inside, the part computes as the base model; afterwards the same adapter is active again."""
    slots = slots_of(part)
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
    return slots_of(part).shared(segments)


def layout(adapter: Adapter) -> dict[str, list[int]]:
    """Key -> shape of every tensor of an adapter's state, sorted by key."""
    return {key: list(value.shape) for key, value in adapter.state().items()}


def layout_of(
    part: PartModule, settings: AdapterSettings, blocks: range | None = None
) -> dict[str, list[int]]:
    """What `layout` says of the adapter that `attach` would put on this part; nothing changes.

    Raises:
        ModelError: as `attach`.
    """
    found: dict[str, list[int]] = {}
    for kind in settings.kinds:
        chosen = part.block_range if blocks is None else blocks
        found |= KINDS.get(kind).layout(part, settings, chosen)
    return {key: found[key] for key in sorted(found)}


def initial_state(layout: Mapping[str, Sequence[int]], seed: int) -> AdapterState:
    """The fresh weights that `attach` draws for these keys and shapes, for any part of the model.

    Args:
        layout: key -> shape, as `layout` gives it.
        seed: `AdapterSettings.seed`.
    """
    return {key: _kind_of(key).fresh(key, layout[key], seed) for key in sorted(layout)}


def _kind_of(key: str) -> AdapterKind:
    # A member of a federation may bring keys of its own; they are drawn as LoRA's A is.
    owners = [name for name in KINDS if KINDS.get(name).owns(key)]
    return KINDS.get(owners[0] if owners else "lora")
