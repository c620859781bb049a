"""Sparse rows as a folder of their own, as PEFT has no such format, and what they add to weights.

It does not join parts nor write models (`export`). The format is written down in docs/adapters.md.

Shapes: O and I = output and input features of a layer, R = rows that learnt.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.errors import ModelError
from cutlayer.model.adapter_settings import AdapterSettings, SparseSettings
from cutlayer.model.adapters import AdapterState
from cutlayer.model.attention_heads import find_heads
from cutlayer.model.exported_base import Delta, ExportedBase, check_addable, weight_name
from cutlayer.model.families import meta_model
from cutlayer.model.folder import ModelFolder
from cutlayer.model.lora_targets import is_transposed
from cutlayer.model.sparse import SPARSE_KEY
from cutlayer.model.sparse_choice import choose_rows, digest_of, row_norms
from cutlayer.model.tensor_file import TensorFile, write_tensor_file

__all__ = ["SPARSE_CONFIG", "SPARSE_WEIGHTS", "check_sparse", "read_sparse", "write_sparse"]

SPARSE_CONFIG = "sparse_config.json"
SPARSE_WEIGHTS = "sparse_model.safetensors"

_FORMAT = "cutlayer-sparse-1"
_BLOCK = re.compile(r"(?P<block>.+?\.\d+)\.(?P<layer>.+)")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_sparse(state: AdapterState, settings: AdapterSettings) -> None:
    """Refuse keys of another kind.

    Raises:
        ModelError: there are some.
    """
    for key in state:
        if SPARSE_KEY.fullmatch(key) is None:
            raise ModelError(f"the adapter state has {key}, which is no difference of sparse rows")


def write_sparse(
    folder: Path, state: AdapterState, settings: AdapterSettings, base: ExportedBase
) -> None:
    """Write sparse_config.json and sparse_model.safetensors: rows and differences by layer.

    Raises:
        ModelError: the base model's weights do not give the rows that were trained.
    """
    tensors: dict[str, Tensor] = {}
    for path, rows_R, delta_RI in _with_rows(state, settings.sparse, base.files()):
        tensors[f"{path}.rows"], tensors[f"{path}.delta"] = rows_R, delta_RI
    table = {
        "base_model_name_or_path": base.name,
        "fan_in_fan_out": base.is_transposed(),
        "format": _FORMAT,
        **settings.sparse.model_dump(mode="json"),
    }
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    (folder / SPARSE_CONFIG).write_text(text, encoding="utf-8")
    write_tensor_file(folder / SPARSE_WEIGHTS, tensors, tensors.__getitem__)


def read_sparse(folder: Path, model: ModelFolder) -> dict[str, Delta]:
    """Tensor name of the base model -> what the rows add to it.

    Raises:
        ModelError: it is damaged or fits another model.
    """
    is_transposed = _read_config(folder / SPARSE_CONFIG)
    file, layout = TensorFile(folder / SPARSE_WEIGHTS), model.layout()
    paths = sorted(n.removesuffix(".rows") for n in file.names() if n.endswith(".rows"))
    if {f"{path}.{what}" for path in paths for what in ("rows", "delta")} != file.names():
        raise ModelError(f"{file.path} has rows without differences, or the reverse")
    deltas = {}
    for path in paths:
        name = weight_name(path, layout, folder)
        rows_R, delta_RI = file.get(f"{path}.rows"), file.get(f"{path}.delta")
        shape = tuple(layout[name].shape)
        # A hostile folder may name a norm, whose weight is no matrix.
        is_matrix = len(shape) == 2
        num_rows, num_inputs = shape[:: -1 if is_transposed else 1] if is_matrix else (0, 0)
        if (
            rows_R.ndim != 1
            or delta_RI.shape != (len(rows_R), num_inputs)
            or rows_R.dtype != torch.int64
            or len(rows_R) == 0
            or not 0 <= int(rows_R.min()) <= int(rows_R.max()) < num_rows
        ):
            raise ModelError(
                f"{folder}: the rows of {path} do not fit {name} of {model.path}, which is "
                f"{shape}; was it made for another model?"
            )
        check_addable(name, layout[name])
        deltas[name] = _scattered(rows_R, delta_RI, num_rows, is_transposed)
    return deltas


def _with_rows(
    state: AdapterState, settings: SparseSettings, model: ModelFolder
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer's path, its rows and their differences; the rows come from the public weights."""
    whole = meta_model(model.config)
    by_block: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, delta_RI in state.items():
        match = SPARSE_KEY.fullmatch(key)
        assert match is not None
        parts = _BLOCK.fullmatch(match["path"])
        if parts is None:
            raise ModelError(f"{match['path']} is in no block; export with the run's own settings")
        layers = by_block.setdefault(parts["block"], {})
        layers[parts["layer"]] = match["digest"], delta_RI
    for path, layers in by_block.items():
        block = whole.get_submodule(path)
        rows = _rows_of(path, block, {n: d for n, (d, _) in layers.items()}, settings, model)
        for name, (_, delta_RI) in layers.items():
            yield f"{path}.{name}", rows[name], delta_RI


def _rows_of(
    path: str,
    block: torch.nn.Module,
    digests: Mapping[str, str],
    settings: SparseSettings,
    model: ModelFolder,
) -> dict[str, Tensor]:
    """Rows of one block's layers, as training in some dtype has chosen them."""
    heads, layout = find_heads(block, model.config), model.layout()
    for dtype in (None, *_DTYPES):

        def norms(name: str, dtype: torch.dtype | None = dtype) -> Tensor:
            weight = model.get(weight_name(f"{path}.{name}", layout, model.path))
            weight = weight if dtype is None else weight.to(dtype)
            return row_norms(weight, is_transposed(block.get_submodule(name)))

        found = choose_rows(digests.keys(), heads, norms, settings)
        if {name: digest_of(rows) for name, rows in found.items()} == dict(digests):
            return found
    raise ModelError(
        f"{model.path} does not give the rows of {path} that were trained; name the base model and "
        "the settings of that run"
    )


def _scattered(rows_R: Tensor, delta_RI: Tensor, num_rows: int, is_transposed: bool) -> Delta:
    def compute() -> Tensor:
        delta_OI = torch.zeros(num_rows, delta_RI.shape[1]).index_add_(0, rows_R, delta_RI.float())
        return delta_OI.T if is_transposed else delta_OI

    return compute


def _read_config(path: Path) -> bool:
    """Whether the base model keeps weights as (in, out)."""
    try:
        table = json.loads(path.read_bytes())
        found, is_transposed = table["format"], bool(table["fan_in_fan_out"])
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} describes no sparse rows ({error!r}); export it anew") from error
    if found != _FORMAT:
        raise ModelError(f"{path} has format {found!r}; this release reads {_FORMAT}")
    return is_transposed
