"""Join the parts' adapters into one standard PEFT folder, or into the model's own weights.

It does not train or attach. Nothing here needs cutlayer to be read again: PEFT and transformers do.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, TaskType
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import ModelError, StorageError
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.model.denoiser import DENOISER_PREFIX
from cutlayer.model.families import meta_model
from cutlayer.model.folder import TOKENIZER_FILES, ModelFolder, resolve_model
from cutlayer.model.partition import Part
from cutlayer.model.tensor_file import TensorFile, write_tensor_file
from cutlayer.storage.files import replace_folder

__all__ = ["export_adapter", "join_states", "merge_adapter", "uses_conv1d"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_BLOCK = re.compile(r"\.(\d+)\.")


def export_adapter(
    folder: Path,
    states: Sequence[AdapterState],
    settings: AdapterSettings,
    base_model_name: str,
    *,
    fan_in_fan_out: bool | None = None,
) -> None:
    """Write one PEFT adapter folder: adapter_config.json and adapter_model.safetensors.

    Args:
        folder: new folder, or an earlier export, which is replaced as a whole.
        states: the parts' adapter states, in any order.
        settings: what they were trained with.
        base_model_name: hub id or folder of the base model, as PEFT will look for it.
        fan_in_fan_out: the base model keeps weights as (in, out), see `uses_conv1d`; None looks
            into base_model_name if it is a local folder.

    Raises:
        ModelError: the states overlap, are empty, not finite, or do not fit the settings.
        StorageError: the folder holds other things or cannot be written.
    """
    joined = join_states(states, settings)
    if fan_in_fan_out is None:
        is_local = Path(base_model_name).is_dir()
        fan_in_fan_out = is_local and uses_conv1d(ModelFolder(base_model_name).config)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model_name,
        inference_mode=True,
        r=settings.rank,
        # PEFT declares an int; a whole number is written as one.
        lora_alpha=int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_target_modules(joined, settings),
        fan_in_fan_out=fan_in_fan_out,
    )

    def fill(new: Path) -> None:
        _write_config(config, new)
        write_tensor_file(new / _WEIGHTS, joined, joined.__getitem__)

    _replace(folder, fill, is_own=lambda names: names <= {_CONFIG, _WEIGHTS})


def merge_adapter(
    model_folder: ModelFolder | str | Path, adapter_folder: Path, out_folder: Path
) -> None:
    """Write a plain model folder, tokenizer included, whose weights contain a LoRA adapter.

    One tensor is held at a time; weights keep the base model's dtype, the sum is in float32.

    Args:
        model_folder: the base model; a name is opened by `resolve_model`.
        adapter_folder: adapter_config.json and adapter_model.safetensors.
        out_folder: new folder, or an earlier merged model, which is replaced as a whole.

    Raises:
        ModelError: the adapter is not plain LoRA, is damaged or fits another model.
        StorageError: the folder holds other things or cannot be written.
    """
    model = model_folder if isinstance(model_folder, ModelFolder) else resolve_model(model_folder)
    if out_folder.exists() and out_folder.samefile(model.path):
        raise StorageError(f"{out_folder} is the base model itself; choose a new folder")
    deltas = _read_deltas(adapter_folder, model)

    def merged(name: str) -> Tensor:
        weight = model.get(name)
        if name not in deltas:
            return weight
        return (weight.float() + deltas[name]()).to(weight.dtype)

    def fill(new: Path) -> None:
        write_tensor_file(new / "model.safetensors", model.layout(), merged)
        _copy_rest(model, new)

    _replace(out_folder, fill, is_own=lambda names: {"config.json", "model.safetensors"} <= names)


def join_states(states: Sequence[AdapterState], settings: AdapterSettings) -> AdapterState:
    """One state of all parts, checked.

    Raises:
        ModelError: the states overlap, are empty, not finite, do not fit the settings, or have a
            denoiser.
    """
    joined: AdapterState = {}
    if any(key.startswith(DENOISER_PREFIX) for state in states for key in state):
        raise ModelError(
            "the tail has a denoiser, which no adapter and no merged model can hold: generate with "
            "this run, or train one with privacy.denoiser = false to export it"
        )
    for state in states:
        if both := sorted(joined.keys() & state.keys()):
            raise ModelError(f"two parts hold {both[0]}; export the parts of one cut")
        joined |= state
    if not joined:
        raise ModelError("there is nothing to export: no part has trained weights")
    pairs = _pairs(joined, "the adapter state")
    for path, (a, b) in pairs.items():
        if a.shape[0] != settings.rank or b.shape[1] != settings.rank:
            raise ModelError(f"{path} does not have rank {settings.rank}; give its own settings")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ModelError(f"{path} is not finite: training diverged; export an earlier step")
    return {key: joined[key].float().contiguous() for key in sorted(joined)}


def uses_conv1d(config: PreTrainedConfig) -> bool:
    """Whether the architecture keeps linear weights as (in, out), as gpt2 does."""
    return any(isinstance(module, Conv1D) for module in meta_model(config).modules())


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
    path = folder / _CONFIG
    table = json.loads(path.read_bytes())
    table["target_modules"] = sorted(table["target_modules"])
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(
    folder: Path, fill: Callable[[Path], None], is_own: Callable[[set[str]], bool]
) -> None:
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if names and not is_own(names):
            raise StorageError(f"{folder} holds other files; choose a new folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {folder.parent}: {error.strerror}") from error
    replace_folder(folder, fill)


def _read_deltas(folder: Path, model: ModelFolder) -> dict[str, Callable[[], Tensor]]:
    """Tensor name of the base model -> what makes the float32 matrix to add to it."""
    scaling, is_transposed = _read_lora_config(folder / _CONFIG)
    file = TensorFile(folder / _WEIGHTS)
    pairs = _pairs({key: file.get(key) for key in file.names()}, folder / _WEIGHTS)
    layout = model.layout()
    deltas = {}
    for path, (a, b) in pairs.items():
        name = _weight_name(path, layout, folder)
        shape = (a.shape[1], b.shape[0]) if is_transposed else (b.shape[0], a.shape[1])
        if tuple(layout[name].shape) != shape or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{folder}: {path} is {shape}, {name} of {model.path} is "
                f"{tuple(layout[name].shape)}; was the adapter made for another model?"
            )
        if layout[name].dtype not in _FLOATS:
            raise ModelError(f"{name} is quantised ({layout[name].dtype}); name the base model")
        deltas[name] = _product(a, b, scaling, is_transposed)
    return deltas


def _product(a: Tensor, b: Tensor, scaling: float, is_transposed: bool) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        delta = (b.float() @ a.float()) * scaling
        return delta.T if is_transposed else delta

    return compute


def _read_lora_config(path: Path) -> tuple[float, bool]:
    """Scaling, and whether the base model keeps weights as (in, out)."""
    try:
        table = json.loads(path.read_bytes())
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


def _weight_name(path: str, layout: Mapping[str, Tensor], folder: Path) -> str:
    """The checkpoint's name of a layer's weight; some files lack the base model's prefix."""
    for candidate in (f"{path}.weight", f"{path.partition('.')[2]}.weight"):
        if candidate in layout:
            return candidate
    raise ModelError(f"{folder} adapts {path}, which the model does not have; name its base model")


def _copy_rest(model: ModelFolder, new: Path) -> None:
    model.fetch_tokenizer()
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (model.path / name).is_file():
            # Contents only: a hub cache's files are links.
            shutil.copyfile(model.path / name, new / name)
