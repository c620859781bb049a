"""Adapters of head and tail from an exported folder: what a colluding client hands over (T2).

It does not attack, and puts nothing on the trunk.
"""

import json
from collections.abc import Callable
from pathlib import Path

from cutlayer.errors import ModelError
from cutlayer.model.adapters import AdapterSettings, AdapterState, attach, layout_of
from cutlayer.model.partition import Head, Tail
from cutlayer.model.tensor_file import TensorFile

__all__ = ["adapters_of"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def adapters_of(folder: Path) -> Callable[[Head, Tail], None]:
    """What puts the adapters of an exported PEFT folder on public parts, for `Knowledge.adapt`.

    What it returns raises ModelError where the folder has nothing for head and tail, or does not
    fit them.

    Args:
        folder: written by `cutlayer export`.

    Raises:
        ModelError: it is no such folder.
    """
    rank, alpha = _scaling(folder / _CONFIG)
    file = TensorFile(folder / _WEIGHTS)
    state = {name: file.get(name) for name in file.names()}
    targets = sorted({name.split(".")[-3] for name in state if name.count(".") >= 3})
    if not targets:
        raise ModelError(f"{folder} has no LoRA weight; give what `cutlayer export` wrote")
    settings = AdapterSettings(rank=rank, alpha=alpha, targets=targets)

    def adapt(head: Head, tail: Tail) -> None:
        if not any([_put(part, settings, state) for part in (head, tail)]):
            raise ModelError(
                f"{folder} has no adapter for head or tail of this cut; give the one that was "
                "trained with the recorded run"
            )

    return adapt


def _put(part: Head | Tail, settings: AdapterSettings, state: AdapterState) -> bool:
    """Whether the state has something for this part."""
    wanted = layout_of(part, settings)
    own = {key: state[key] for key in wanted if key in state}
    if own:
        attach(part, settings).load(own)
    return bool(own)


def _scaling(path: Path) -> tuple[int, float]:
    """Rank and alpha."""
    try:
        table = json.loads(path.read_bytes())
        rank, alpha = int(table["r"]), float(table["lora_alpha"])
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}; give a folder that `cutlayer export` wrote"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a LoRA config ({error!r}); export it anew") from error
    if rank < 1 or alpha <= 0:
        raise ModelError(f"{path} has rank {rank} and alpha {alpha:g}; export it anew")
    return rank, alpha
