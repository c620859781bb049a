"""Blocks that are about to come to the client: is there memory, are there weights, which adapter.

They are loaded once for that, alone, before anything has moved; whoever trains loads its parts
itself afterwards.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cutlayer.client.recut_sensors import available_bytes
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings, layout_of
from cutlayer.model.checkpoint import DTYPES, load_part
from cutlayer.model.folder import ModelFolder
from cutlayer.model.part_settings import PartSettings
from cutlayer.model.partition import Cut, Part, PartModule, build_part

__all__ = ["Arrived", "inspect", "room_on"]

_BYTES_PER_TRAINED = 16
"""float32 weight, gradient and two moments."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """What is known of the blocks that come."""

    leaves: dict[str, str]
    """Their manifest leaves, recomputed from the client's own files."""
    layout: dict[str, list[int]]
    """Key -> shape of the adapter that has to come with them."""
    num_bytes: int
    """Memory that they will take, without activations."""


def room_on(device: str) -> int | None:
    """Memory that this process may still take on a torch device, in bytes; None is unknown."""
    if torch.device(device).type != "cuda":
        return available_bytes()
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(free)


def inspect(
    folder: ModelFolder,
    model: PartSettings,
    adapter: AdapterSettings,
    runs: Sequence[Cut],
    room: Callable[[str], int | None] = room_on,
) -> Arrived:
    """Look at blocks that are to come, run by run.

    Args:
        folder: the client's copy of the model.
        model: its dtype and device.
        adapter: what is trained.
        runs: unbroken runs of blocks.
        room: memory on a device, in bytes.

    Raises:
        ConfigError: they do not fit into memory.
        ModelError: the folder lacks their weights.
    """
    shapes = [build_part(folder.config, run, Part.TRUNK) for run in runs]
    itemsize = DTYPES[model.dtype].itemsize
    frozen = sum(p.numel() * itemsize for part in shapes for p in part.parameters())
    names = ", ".join(str(block) for run in runs for block in run.trunk)
    _require_room(frozen, room(model.device), names)
    leaves: dict[str, str] = {}
    layout: dict[str, list[int]] = {}
    for run in runs:
        part = load_part(folder, run, Part.TRUNK, model.dtype, model.device)
        assert isinstance(part, PartModule)
        leaves |= {name: leaf for name, leaf in part.leaves.items() if name.startswith("block.")}
        layout |= layout_of(part, adapter)
        del part
    trained = _BYTES_PER_TRAINED * sum(math.prod(shape) for shape in layout.values())
    _require_room(frozen + trained, room(model.device), names)
    return Arrived(leaves=leaves, layout=layout, num_bytes=frozen + trained)


def _require_room(needed: int, available: int | None, names: str) -> None:
    if available is not None and needed > available:
        raise ConfigError(
            f"blocks {names} would come to this client and need {needed / 1e6:,.1f} MB, and "
            f"{available / 1e6:,.1f} MB are available: a client without memory for its new blocks; "
            "choose a cut that leaves them at the server, or free memory"
        )
