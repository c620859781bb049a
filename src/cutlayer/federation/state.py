"""Adapter states as one vector and by owner: layouts, order, names. It averages nothing.

Shapes: N = values of all tensors of a layout, in the order of the sorted keys.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError, SpecMismatch
from cutlayer.model.adapters import AdapterState

__all__ = [
    "Layout",
    "check_layout",
    "flatten",
    "num_values",
    "owned_key",
    "owned_state",
    "unflatten",
    "update_layout",
]

Layout = Mapping[str, Sequence[int]]
"""Key and shape of every tensor of a state."""

MAX_KEYS = 8192
"""As many tensors as a frame may have."""
MAX_VALUES = 1 << 28
"""1 GiB in float32, 2 GiB masked."""
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,256}")


def flatten(state: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """One float32 vector [N] of the layout's keys, sorted."""
    parts = [state[key].detach().float().reshape(-1) for key in sorted(layout)]
    return torch.cat(parts) if parts else torch.zeros(0)


def unflatten(values_N: Tensor, layout: Layout) -> AdapterState:
    """The state that `flatten` made a vector of.

    Raises:
        ProtocolError: the vector is longer or shorter than the layout.
    """
    if values_N.numel() != num_values(layout):
        raise ProtocolError(
            f"a vector of {values_N.numel()} values for {num_values(layout)} of the layout"
        )
    state, start = {}, 0
    for key in sorted(layout):
        end = start + math.prod(layout[key])
        state[key] = values_N[start:end].reshape(tuple(layout[key])).clone()
        start = end
    return state


def num_values(layout: Layout) -> int:
    """N."""
    return sum(math.prod(shape) for shape in layout.values())


def update_layout(layout: Layout, freezes_a: bool) -> dict[str, list[int]]:
    """What an update has: every key, but for LoRA's A where the strategy freezes it."""
    return {
        key: list(shape)
        for key, shape in sorted(layout.items())
        if not (freezes_a and ".lora_A." in key)
    }


def check_layout(layout: Layout, trunk: Layout) -> None:
    """Refuse a head and tail that no memory holds, or that overlap the trunk.

    Raises:
        ProtocolError: too many or too large tensors, or malformed keys.
        SpecMismatch: a key is the trunk's too.
    """
    if len(layout) > MAX_KEYS or not all(_KEY.fullmatch(key) for key in layout):
        raise ProtocolError(f"layout of {len(layout)} keys, or with malformed ones")
    if not all(len(shape) <= 8 and min(shape, default=0) >= 1 for shape in layout.values()):
        raise ProtocolError("layout with a malformed shape")
    if num_values(layout) > MAX_VALUES:
        raise ProtocolError(
            f"layout of {num_values(layout)} values; the limit is {MAX_VALUES}: lower the rank"
        )
    both = sorted(layout.keys() & trunk.keys())
    if both:
        raise SpecMismatch(
            f"{both[0]} and {len(both) - 1} more keys are the trunk's here; use the server's cut"
        )


def owned_key(owner: str | None, key: str) -> str:
    """The key of a trunk tensor within the federation's state; None owns what all share."""
    return key if owner is None else f"{owner}/{key}"


def owned_state(owner: str | None, state: Mapping[str, Tensor]) -> AdapterState:
    """A trunk's state under its owner's keys."""
    return {owned_key(owner, key): tensor for key, tensor in state.items()}
