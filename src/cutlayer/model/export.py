"""Join the parts' adapters into standard folders, or into the model's own weights.

It does not train or attach, and leaves formats to each kind (`lora_export`, `prefix_export`,
`sparse_export`). PEFT and transformers read what it writes, but for sparse rows, which PEFT does
not know: their format is in docs/adapters.md, and merged into a model they are plain weights.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cutlayer.errors import ModelError, StorageError
from cutlayer.model.adapter_kinds import KINDS
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.model.denoiser import DENOISER_PREFIX
from cutlayer.model.exported_base import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Delta,
    ExportedBase,
    uses_conv1d,
)
from cutlayer.model.folder import TOKENIZER_FILES, ModelFolder, resolve_model
from cutlayer.model.lora_export import check_lora, read_lora, write_lora
from cutlayer.model.prefix_export import check_prefix, write_prefix
from cutlayer.model.sparse_export import (
    SPARSE_CONFIG,
    SPARSE_WEIGHTS,
    check_sparse,
    read_sparse,
    write_sparse,
)
from cutlayer.model.tensor_file import write_tensor_file
from cutlayer.storage.files import replace_folder

__all__ = ["export_adapter", "join_states", "merge_adapter", "uses_conv1d"]


class _Check(Protocol):
    def __call__(self, state: AdapterState, settings: AdapterSettings) -> None: ...


class _Write(Protocol):
    def __call__(
        self, folder: Path, state: AdapterState, settings: AdapterSettings, base: ExportedBase
    ) -> None: ...


_FORMATS: Mapping[str, tuple[_Check, _Write]] = {
    "lora": (check_lora, write_lora),
    "prefix": (check_prefix, write_prefix),
    "sparse": (check_sparse, write_sparse),
}
_TITLES = {"lora": "LoRA", "prefix": "prefix", "sparse": "sparse"}
_OWN_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, SPARSE_CONFIG, SPARSE_WEIGHTS})


def export_adapter(
    folder: Path,
    states: Sequence[AdapterState],
    settings: AdapterSettings,
    base_model_name: str,
    *,
    fan_in_fan_out: bool | None = None,
    base: ModelFolder | None = None,
) -> None:
    """Write an adapter folder: LoRA's or a prefix's as PEFT reads it, or that of sparse rows.

    An adapter of several kinds becomes a folder with one such folder per kind, by its name.

    Args:
        folder: new folder, or an earlier export, which is replaced as a whole.
        states: the parts' adapter states, in any order.
        settings: what they were trained with.
        base_model_name: hub id or folder of the base model, as PEFT will look for it.
        fan_in_fan_out: the base model keeps weights as (in, out), see `uses_conv1d`; None looks
            into its files if they are at hand.
        base: the base model's files; None finds them by name where a kind needs them.

    Raises:
        ModelError: the states overlap, are empty, not finite, or do not fit the settings.
        StorageError: the folder holds other things or cannot be written.
    """
    joined = join_states(states, settings)
    exported = ExportedBase(name=base_model_name, folder=base, fan_in_fan_out=fan_in_fan_out)

    def fill(new: Path) -> None:
        for kind in settings.kinds:
            place = new if len(settings.kinds) == 1 else new / kind
            place.mkdir(exist_ok=True)
            _FORMATS[kind][1](place, _of_kind(joined, kind), settings, exported)

    _replace(folder, fill, is_own=_is_export)


def merge_adapter(
    model_folder: ModelFolder | str | Path, adapter_folder: Path, out_folder: Path
) -> None:
    """Write a plain model folder, tokenizer included, whose weights contain an adapter.

    One tensor is held at a time; weights keep the base model's dtype, the sum is in float32.

    Args:
        model_folder: the base model; a name is opened by `resolve_model`.
        adapter_folder: as `export_adapter` writes it, or another plain LoRA of PEFT's.
        out_folder: new folder, or an earlier merged model, which is replaced as a whole.

    Raises:
        ModelError: the adapter is neither plain LoRA nor sparse rows, is damaged or fits another
            model. A prefix is no weight, so nothing can contain it.
        StorageError: the folder holds other things or cannot be written.
    """
    model = model_folder if isinstance(model_folder, ModelFolder) else resolve_model(model_folder)
    if out_folder.exists() and out_folder.samefile(model.path):
        raise StorageError(f"{out_folder} is the base model itself; choose a new folder")
    deltas, layout = _read_deltas(adapter_folder, model), model.layout()

    def merged(name: str) -> Tensor:
        weight = model.get(name)
        for delta in deltas.get(name, ()):
            weight = weight.float() + delta()
        return weight.to(layout[name].dtype)

    def fill(new: Path) -> None:
        write_tensor_file(new / "model.safetensors", layout, merged)
        _copy_rest(model, new)

    _replace(out_folder, fill, is_own=_is_model)


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
    if strange := sorted(key for key in joined if not _is_of(key, settings.kinds)):
        expected = " or ".join(f"no plain {_TITLES[kind]} weight" for kind in settings.kinds)
        raise ModelError(f"the adapter state has {strange[0]}, which is {expected}")
    for kind in settings.kinds:
        _FORMATS[kind][0](_of_kind(joined, kind), settings)
    for key, tensor in joined.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{key} is not finite: training diverged; export an earlier step")
    return {key: joined[key].float().contiguous() for key in sorted(joined)}


def _is_of(key: str, kinds: Sequence[str]) -> bool:
    return any(KINDS.get(kind).owns(key) for kind in kinds)


def _of_kind(state: AdapterState, kind: str) -> AdapterState:
    return {key: value for key, value in state.items() if _is_of(key, [kind])}


def _read_deltas(folder: Path, model: ModelFolder) -> dict[str, list[Delta]]:
    """Tensor name of the base model -> what to add to it, in the order of kinds."""
    folders = [folder / kind for kind in KINDS if (folder / kind).is_dir()] or [folder]
    found: dict[str, list[Delta]] = {}
    for place in folders:
        is_sparse = (place / SPARSE_CONFIG).is_file()
        for name, delta in (read_sparse if is_sparse else read_lora)(place, model).items():
            found.setdefault(name, []).append(delta)
    return found


def _is_export(folder: Path) -> bool:
    """Whether a folder has nothing but what an export writes."""
    return all(
        path.name in _OWN_FILES
        or (path.is_dir() and path.name in KINDS and {p.name for p in path.iterdir()} <= _OWN_FILES)
        for path in folder.iterdir()
    )


def _is_model(folder: Path) -> bool:
    return {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}


def _replace(folder: Path, fill: Callable[[Path], None], is_own: Callable[[Path], bool]) -> None:
    if folder.exists():
        is_known = folder.is_dir() and (not any(folder.iterdir()) or is_own(folder))
        if not is_known:
            raise StorageError(f"{folder} holds other files; choose a new folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {folder.parent}: {error.strerror}") from error
    replace_folder(folder, fill)


def _copy_rest(model: ModelFolder, new: Path) -> None:
    model.fetch_tokenizer()
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (model.path / name).is_file():
            # Contents only: a hub cache's files are links.
            shutil.copyfile(model.path / name, new / name)
