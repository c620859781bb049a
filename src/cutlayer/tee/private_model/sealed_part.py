"""One part's weights, sealed tensor by tensor, and loaded from there without plain text on disk.

`weights.sealed` holds the tensors one after the other, `index.sealed` the config, the names and
where each tensor lies; both are AES-256-GCM (`storage.vault`), each piece bound to the label.
In the clear are the label and the model's manifest: digests. The key is whoever calls' business;
swap and core dumps are the process's (`tee.process`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from cutlayer.canonical import canonical_json
from cutlayer.errors import ModelError
from cutlayer.model.folder import ModelFolder
from cutlayer.model.manifest import hash_config, manifest_of, names_by_leaf, write_manifest
from cutlayer.model.partition import Cut, Part
from cutlayer.model.tensor_file import DTYPES, raw_bytes
from cutlayer.storage.files import explain_os_errors, replace_folder, write_atomic
from cutlayer.storage.vault import AesVault
from cutlayer.tee.private_model.label import Label, What, key_id_of, read_label, write_label

__all__ = ["SealedFolder", "seal_part"]

_INDEX, _WEIGHTS = "index.sealed", "weights.sealed"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    start: int
    num_bytes: int


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    config: dict[str, object]
    leaves: dict[str, str]
    names: list[str]
    """Of the whole checkpoint: what a part lacks is another part's."""
    tensors: dict[str, _Place]


def seal_part(folder: ModelFolder, cut: Cut, part: Part, out: Path, key: bytes) -> Label:
    """Write one part of a model, sealed; one tensor is held at a time.

    Args:
        folder: the plain model.
        cut: where it is cut.
        part: which part.
        out: folder to write, replaced as a whole.
        key: 32 random bytes, of this part alone.

    Raises:
        ConfigError: the cut exceeds the model.
        ModelError: the model cannot be read.
        StorageError: the folder cannot be written.
    """
    num_blocks = folder.config.num_hidden_layers
    groups = _groups(folder, cut.blocks(part, num_blocks), part)
    config = _config_table(folder.config)
    whole = manifest_of(folder)
    leaves = {leaf: whole.leaves[leaf] for leaf in ("config", *groups)}
    label = Label(
        what=What.WEIGHTS,
        content=_digest(leaves),
        key_id=key_id_of(key),
        part=part.value,
        lower=cut.lower,
        upper=cut.upper,
    )
    vault = AesVault(key)

    def fill(target: Path) -> None:
        places: dict[str, _Place] = {}
        names = [name for group in groups.values() for name in group]
        sealed = _seal_tensors(folder, names, vault, label, places)
        write_atomic(target / _WEIGHTS, sealed, mode=0o644)
        index = _Index(config, leaves, sorted(folder.names()), places)
        data = vault.seal(msgspec.json.encode(index), label.context(_INDEX))
        write_atomic(target / _INDEX, data, mode=0o644)
        write_manifest(whole, target)
        write_label(target, label)

    replace_folder(out, fill)
    return label


class SealedFolder(ModelFolder):
    """A sealed part as `load_part` takes it; tensors are opened one at a time, in memory."""

    def __init__(self, path: Path, key: bytes) -> None:
        """Open the index.

        Args:
            path: written by `seal_part`.
            key: 32 bytes, for example from `key_release`.

        Raises:
            ModelError: not a sealed part, or its config is not the one that was sealed.
            StorageError: another key, or a file was changed or cut short.
        """
        self.path = path
        self.label = read_label(path)
        if self.label.what is not What.WEIGHTS:
            raise ModelError(f"{path} holds a sealed {self.label.what}, not a part's weights")
        self._vault = AesVault(key)
        self._index = self._read_index_file()
        self._config = _make_config(self._index.config, path)
        if _digest(self._index.leaves) != self.label.content or (
            hash_config(self._config) != self._index.leaves.get("config")
        ):
            raise ModelError(f"{path}: config or leaves are not those of the label; seal it again")

    def __repr__(self) -> str:
        return f"SealedFolder({str(self.path)!r})"

    @property
    def leaves(self) -> Mapping[str, str]:
        """Manifest leaves of the part, as they were when it was sealed."""
        return self._index.leaves

    def names(self) -> frozenset[str]:
        """The names of all tensors of the whole checkpoint."""
        return frozenset(self._index.names)

    def layout(self) -> dict[str, Tensor]:
        """Dtype and shape of the part's tensors, as meta tensors."""
        return {
            name: torch.empty(place.shape, dtype=DTYPES[place.dtype], device="meta")
            for name, place in self._index.tensors.items()
        }

    def get(self, name: str) -> Tensor:
        """Open one tensor.

        Raises:
            ModelError: it is not of this part.
            StorageError: the file was changed or cut short.
        """
        place = self._index.tensors.get(name)
        if place is None:
            raise ModelError(
                f"{self.path} is the sealed {self.label.part} of blocks {self.label.lower} to "
                f"{self.label.upper} and has no {name}; use the same part and cut"
            )
        path = self.path / _WEIGHTS
        with explain_os_errors(f"read {path}"), path.open("rb") as file:
            file.seek(place.start)
            sealed = file.read(place.num_bytes)
        plain = bytearray(self._vault.open(sealed, self.label.context(name)))
        if not plain:
            return torch.empty(place.shape, dtype=DTYPES[place.dtype])
        flat = torch.frombuffer(plain, dtype=torch.uint8)
        return flat.view(DTYPES[place.dtype]).reshape(place.shape)

    def fetch_tokenizer(self) -> None:
        """There is none."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A sealed part has none.

        Raises:
            ModelError: always.
        """
        self._refuse_tokenizer()

    def _refuse_tokenizer(self) -> NoReturn:
        raise ModelError(f"{self.path} is sealed weights without a tokenizer; give its folder")

    def _read_index_file(self) -> _Index:
        path = self.path / _INDEX
        with explain_os_errors(f"read {path}"):
            sealed = path.read_bytes()
        plain = self._vault.open(sealed, self.label.context(_INDEX))
        try:
            index = msgspec.json.decode(plain, type=_Index)
        except msgspec.DecodeError as error:
            raise ModelError(f"{path} is of another version; seal the part again") from error
        if unknown := sorted({place.dtype for place in index.tensors.values()} - DTYPES.keys()):
            raise ModelError(f"{path} has dtypes {', '.join(unknown)}, which cutlayer cannot read")
        return index


def _groups(folder: ModelFolder, blocks: range, part: Part) -> dict[str, list[str]]:
    """Tensor names by leaf, of the leaves that `load_part` reads for a part."""
    groups = names_by_leaf(folder.names(), folder.config.num_hidden_layers)
    leaves = [f"block.{block}" for block in blocks]
    # A tied matrix is in the file under one of its two names.
    is_tied = not groups["lm_head"] or not groups["embedding"]
    if part is Part.HEAD:
        leaves += ["embedding", "lm_head"] if is_tied else ["embedding"]
    if part is Part.TAIL:
        leaves += ["lm_head", "norm"] + (["embedding"] if is_tied else [])
    return {leaf: groups[leaf] for leaf in leaves}


def _seal_tensors(
    folder: ModelFolder,
    names: list[str],
    vault: AesVault,
    label: Label,
    places: dict[str, _Place],
) -> Iterator[bytes]:
    """Sealed tensors in order; fills `places` while it is consumed."""
    start = 0
    for name in names:
        tensor = folder.get(name)
        sealed = vault.seal(bytes(raw_bytes(tensor)), label.context(name))
        dtype = _DTYPE_NAMES[tensor.dtype]
        places[name] = _Place(dtype, list(tensor.shape), start, len(sealed))
        start += len(sealed)
        yield sealed


def _config_table(config: PreTrainedConfig) -> dict[str, object]:
    table: dict[str, object] = json.loads(config.to_json_string(use_diff=True))
    if hash_config(_make_config(table, Path("config.json"))) != hash_config(config):
        raise ModelError(
            f"the config of {config.model_type} does not survive being written and read; it "
            "cannot be sealed"
        )
    return table


def _make_config(table: Mapping[str, object], path: Path) -> PreTrainedConfig:
    rest = {name: value for name, value in table.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(str(table["model_type"]), **rest)
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: the sealed config cannot be used: {error}") from error


def _digest(leaves: Mapping[str, str]) -> str:
    return hashlib.sha256(b"cutlayer sealed leaves 1\0" + canonical_json(dict(leaves))).hexdigest()
