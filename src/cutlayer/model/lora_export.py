"""LoRA as a standard PEFT folder: written from a state, read as what to add to weights.

It does not join parts nor write models (`export`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, TaskType
from torch import Tensor

from cutlayer.errors import ModelError
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.adapters import AdapterState
from cutlayer.model.exported_base import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Delta,
    ExportedBase,
    check_addable,
    weight_name,
)
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Part
from cutlayer.model.tensor_file import TensorFile, write_tensor_file

__all__ = ["check_lora", "read_lora", "write_lora"]

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_BLOCK = re.compile(r"\.(\d+)\.")


def write_lora(
    folder: Path, state: AdapterState, settings: AdapterSettings, base: ExportedBase
) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base.name,
        inference_mode=True,
        r=settings.rank,
        # PEFT declares an int; a whole number is written as one.
        lora_alpha=int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_target_modules(state, settings),
        fan_in_fan_out=base.is_transposed(),
    )
    _write_config(config, folder)
    write_tensor_file(folder / ADAPTER_WEIGHTS, state, state.__getitem__)


def check_lora(state: AdapterState, settings: AdapterSettings) -> None:
    """Refuse a state that is not LoRA of these settings.

    Raises:
        ModelError: a key, a missing factor or another rank.
    """
    for path, (a, b) in _pairs(state, "the adapter state").items():
        if a.shape[0] != settings.rank or b.shape[1] != settings.rank:
            raise ModelError(f"{path} does not have rank {settings.rank}; give its own settings")


def read_lora(folder: Path, model: ModelFolder) -> dict[str, Delta]:
    """Tensor name of the base model -> what LoRA adds to it.

    Raises:
        ModelError: it is not plain LoRA, is damaged or fits another model.
    """
    scaling, is_transposed = _read_lora_config(folder / ADAPTER_CONFIG)
    file = TensorFile(folder / ADAPTER_WEIGHTS)
    pairs = _pairs({key: file.get(key) for key in file.names()}, folder / ADAPTER_WEIGHTS)
    layout = model.layout()
    deltas = {}
    for path, (a, b) in pairs.items():
        name = weight_name(path, layout, folder)
        shape = (a.shape[1], b.shape[0]) if is_transposed else (b.shape[0], a.shape[1])
        if tuple(layout[name].shape) != shape or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{folder}: {path} is {shape}, {name} of {model.path} is "
                f"{tuple(layout[name].shape)}; was the adapter made for another model?"
            )
        check_addable(name, layout[name])
        deltas[name] = _product(a, b, scaling, is_transposed)
    return deltas


def _product(a: Tensor, b: Tensor, scaling: float, is_transposed: bool) -> Delta:
    def compute() -> Tensor:
        delta = (b.float() @ a.float()) * scaling
        return delta.T if is_transposed else delta

    return compute


def _read_lora_config(path: Path) -> tuple[float, bool]:
    """Scaling, and whether the base model keeps weights as (in, out)."""
    try:
        table = json.loads(path.read_bytes())
        if table["peft_type"] == "PREFIX_TUNING":
            raise ModelError(
                f"{path} is a prefix, which is no weight, so no model can contain it; load it with "
                "PEFT, or train without the kind prefix to merge"
            )
        scaling = float(table["lora_alpha"]) / int(table["r"])
        kind, is_transposed = table["peft_type"], bool(table.get("fan_in_fan_out"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{path} is not a LoRA config ({error!r}); export it anew") from error
    special = [name for name in _SPECIAL if table.get(name)]
    if table.get("bias", "none") != "none":
        special.append("bias")
    if kind != "LORA" or special:
        raise ModelError(f"{path} is {kind} with {special}; only plain LoRA can be merged here")
    return scaling, is_transposed


_SPECIAL = (
    "alpha_pattern",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)
"""Settings of PEFT's LoRA that change what is added to a weight."""


def _pairs(state: Mapping[str, Tensor], where: object) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> its two factors (rank, in) and (out, rank)."""
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelError(f"{where} has {key}, which is no plain LoRA weight")
        factors.setdefault(match["path"], {})[match["factor"]] = tensor
    for path, found in factors.items():
        if len(found) != 2:
            raise ModelError(f"{where} has only lora_{min(found)} of {path}; it is incomplete")
    return {path: (found["A"], found["B"]) for path, found in factors.items()}


def _target_modules(state: AdapterState, settings: AdapterSettings) -> list[str]:
    """Short names where all parts are trained, else whole paths.

    PEFT adapts every layer that a short name fits, also those of a part that was left out.
    """
    paths = sorted(_pairs(state, "the adapter state"))
    blocks = [_BLOCK.search(path) for path in paths]
    indices = {int(block[1]) for block in blocks if block}
    has_all_parts = set(settings.parts) == set(Part) and indices == set(range(len(indices)))
    if not has_all_parts:
        return paths
    if settings.targets != "all-linear":
        return sorted(settings.targets)
    return sorted({path.rpartition(".")[2] for path in paths})


def _write_config(config: LoraConfig, folder: Path) -> None:
    """As PEFT writes it, but in one order: its sets would make every export differ."""
    config.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    table = json.loads(path.read_bytes())
    table["target_modules"] = sorted(table["target_modules"])
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
