"""The kinds that an adapter may have, by name: what each has to offer, and the registry of them.

It holds none of them itself (`lora`, `prefix`, `sparse`).
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapter_slots import KindOnPart, Slots
from cutlayer.model.partition import PartModule
from cutlayer.registry import Registry

__all__ = ["KINDS", "AdapterKind", "generator_of", "some"]


class AdapterKind(Protocol):
    """One kind of adapter; its keys carry global block indices and belong to no other kind."""

    def owns(self, key: str) -> bool:
        """Whether a key of a state is of this kind."""

    def fresh(self, key: str, shape: Sequence[int], seed: int) -> Tensor:
        """Initial values of a key, float32: the same at every cut."""

    def layout(
        self, part: PartModule, settings: AdapterSettings, blocks: range
    ) -> dict[str, list[int]]:
        """Key -> shape of what `KindOnPart.add` would put on these blocks of a part.

        Raises:
            ModelError: the settings do not fit the part.
        """

    def on(self, part: PartModule, slots: Slots) -> KindOnPart:
        """All adapters of this kind on one part; none so far."""


KINDS: Registry[AdapterKind] = Registry("adapter kind")


def generator_of(key: str, seed: int) -> torch.Generator:
    """A generator of this key's own, so that its values depend on no other key."""
    digest = hashlib.sha256(f"{seed}|{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def some(names: Sequence[str]) -> str:
    """Up to three names for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
