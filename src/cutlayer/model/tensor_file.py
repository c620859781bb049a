"""Read and write safetensors files one tensor at a time, so that no other becomes resident.

It does not convert dtypes or map names. A memory map would count every touched page of the file as
the process's own; a plain read into the tensor's memory counts once.
"""

import json
import math
from collections.abc import Callable, Mapping
from io import RawIOBase
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cutlayer.errors import ModelError, StorageError

__all__ = [
    "TensorFile",
    "raw_bytes",
    "read_tensors",
    "write_tensor_file",
]

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class TensorFile:
    """One safetensors file; the header is read and checked at once, tensors when asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ModelError: the file is missing, truncated or not safetensors.
        """
        self.path = path
        try:
            self._entries, self._data_start = _read_header(path)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error

    def names(self) -> frozenset[str]:
        """The names of all tensors in the file."""
        return frozenset(self._entries)

    def layout(self) -> dict[str, Tensor]:
        """Every tensor's dtype and shape, as tensors on the meta device."""
        return {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in self._entries.items()
        }

    def get(self, name: str) -> Tensor:
        """Read one tensor in the file's dtype; its memory is the caller's own.

        Raises:
            ModelError: no such tensor, or the file ends before it.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"{self.path} has no tensor {name}; the checkpoint is incomplete")
        begin, end = entry.data_offsets
        raw = torch.empty(end - begin, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._data_start + begin)
                _read_fully(file, raw.numpy().data)
        except (OSError, EOFError) as error:
            raise ModelError(f"cannot read {name} from {self.path}: {error}") from error
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def write_tensor_file(
    path: Path, layout: Mapping[str, Tensor], get: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file; one tensor is held at a time.

    Args:
        path: the file to write.
        layout: the tensors' names, dtypes and shapes; tensors on the meta device will do.
        get: makes a tensor, on the CPU, when its turn comes.

    Raises:
        OSError: the disk is full, no permission.
    """
    names = sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + layout[name].numel() * layout[name].dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[layout[name].dtype],
            "shape": list(layout[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = get(name)
            assert (tensor.shape, tensor.dtype) == (layout[name].shape, layout[name].dtype), name
            file.write(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes in row-major order; no copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_fully(file: RawIOBase, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("the file ends inside the tensor; download it again")
        buffer = buffer[count:]


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """The entries by name, and where the data starts, both checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} is not a safetensors file or is truncated; download it again")
        header = file.read(length)
    entries = _parse_header(path, header)
    needed = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if 8 + length + needed > size:
        raise ModelError(
            f"{path} is truncated: {size} bytes, its header names {8 + length + needed}; "
            "download it again"
        )
    return entries, 8 + length


def _parse_header(path: Path, header: bytes) -> dict[str, _Entry]:
    try:
        table = json.loads(header)
        if not isinstance(table, dict):
            raise ModelError(f"{path}: the safetensors header is no table; download it again")
        table.pop("__metadata__", None)
        entries = msgspec.convert(table, dict[str, _Entry])
    except (ValueError, msgspec.ValidationError) as error:
        raise ModelError(f"{path}: malformed safetensors header: {error}") from error
    for name, entry in entries.items():
        _check_entry(path, name, entry)
    return entries


def _check_entry(path: Path, name: str, entry: _Entry) -> None:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        known = ", ".join(sorted(DTYPES))
        raise ModelError(f"{path}: {name} has dtype {entry.dtype}; cutlayer reads {known}")
    begin, end = entry.data_offsets
    is_valid = 0 <= begin <= end and min(entry.shape, default=0) >= 0
    if not is_valid or end - begin != math.prod(entry.shape) * dtype.itemsize:
        raise ModelError(f"{path}: bytes {begin}..{end} do not fit {name} {entry.shape}")


def read_tensors(files: Mapping[str, bytes], name: str) -> dict[str, Tensor]:
    """All tensors of a small safetensors file that is in memory already.

    Raises:
        StorageError: it is missing or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load(files[name])
    except (KeyError, SafetensorError) as error:
        raise StorageError(f"saved file {name} is missing or damaged: {error}") from error
    return tensors
