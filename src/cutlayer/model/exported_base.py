"""What exports of every kind share: the base model that they name, and its tensors.

It writes nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import ModelError
from cutlayer.model.families import meta_model
from cutlayer.model.folder import ModelFolder, resolve_model

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "Delta",
    "ExportedBase",
    "check_addable",
    "uses_conv1d",
    "weight_name",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""PEFT's names."""

Delta = Callable[[], Tensor]
"""Makes the float32 matrix to add to a weight."""

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, kw_only=True)
class ExportedBase:
    """The base model of an exported adapter."""

    name: str
    """Hub id or folder, as PEFT will look for it."""
    folder: ModelFolder | None = None
    """Its files, where they are at hand."""
    fan_in_fan_out: bool | None = None
    """Whether it keeps weights as (in, out); None looks into the files."""

    def files(self) -> ModelFolder:
        """Its files, by name if they are not at hand.

        Raises:
            ModelError: they are nowhere.
        """
        return resolve_model(self.name) if self.folder is None else self.folder

    def is_transposed(self) -> bool:
        """Whether it keeps weights as (in, out); False where its files are not at hand."""
        if self.fan_in_fan_out is not None:
            return self.fan_in_fan_out
        if self.folder is not None:
            return uses_conv1d(self.folder.config)
        return Path(self.name).is_dir() and uses_conv1d(ModelFolder(self.name).config)


def uses_conv1d(config: PreTrainedConfig) -> bool:
    """Whether the architecture keeps linear weights as (in, out), as gpt2 does."""
    return any(isinstance(module, Conv1D) for module in meta_model(config).modules())


def weight_name(path: str, layout: Mapping[str, Tensor], folder: Path) -> str:
    """The checkpoint's name of a layer's weight; some files lack the base model's prefix.

    Raises:
        ModelError: the model has no such layer.
    """
    for candidate in (f"{path}.weight", f"{path.partition('.')[2]}.weight"):
        if candidate in layout:
            return candidate
    raise ModelError(f"{folder} adapts {path}, which the model does not have; name its base model")


def check_addable(name: str, weight: Tensor) -> None:
    """Refuse to add to integers.

    Raises:
        ModelError: the weight is quantised.
    """
    if weight.dtype not in _FLOATS:
        raise ModelError(f"{name} is quantised ({weight.dtype}); name the base model")
