"""What a model is, as hashes: one per block and one Merkle root, so that each side proves its part.

It does not load parts or compare over the wire.

Leaves: "config", "embedding", "block.{i}" for every block, "norm", "lm_head". A leaf hashes the
checkpoint's own tensors (name, dtype, shape, bytes) before any conversion. A tied LM head is absent
from the checkpoint; its leaf is the hash of no tensors.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig

from cutlayer.canonical import canonical_json
from cutlayer.errors import ModelError, SpecMismatch
from cutlayer.model.folder import ModelFolder
from cutlayer.model.tensor_file import raw_bytes

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "hash_config",
    "hash_leaf",
    "leaf_of",
    "leaf_order",
    "manifest_of",
    "merge",
    "names_by_leaf",
    "read_manifest",
    "write_manifest",
]

MANIFEST_NAME = "cutlayer-manifest.json"

_BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_LM_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe)\.")
_LEAF = re.compile(r"block\.(0|[1-9]\d*)|config|embedding|norm|lm_head")

_NO_COMPUTATION = frozenset(
    {
        "_attn_implementation",
        "_commit_hash",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "dtype",
        "initializer_range",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Config fields that change no output of any part: where it was, how it was saved, defaults of
text generation. Two sides may differ in them, and in ids of special tokens."""


@dataclass(frozen=True)
class Manifest:
    """The leaves of a model, or those that one side knows: leaf name -> SHA-256 in hex."""

    leaves: Mapping[str, str]

    def root(self) -> str:
        """Merkle tree hash over all leaves in `leaf_order`, in hex.

        A tree node is SHA-256(0x01 | left | right), a leaf SHA-256(0x00 | entry) with entry =
        name's length (8 bytes, little-endian), name, hash; n leaves split at the largest power of
        two below n.

        Raises:
            ModelError: a leaf is missing, so there is no root.
            Source: RFC 6962, section 2.1.
        """
        names = leaf_order(self.leaves)
        entries = [_prefixed(name.encode()) + bytes.fromhex(self.leaves[name]) for name in names]
        return _tree_hash(entries).hex()


def leaf_of(name: str) -> str:
    """The leaf that a checkpoint's tensor belongs to; what is nowhere else counts as "norm"."""
    block = _BLOCK.search(name)
    if block:
        return f"block.{int(block[1])}"
    if _LM_HEAD.search(name):
        return "lm_head"
    return "embedding" if _EMBEDDING.search(name) else "norm"


def names_by_leaf(names: Iterable[str], num_blocks: int) -> dict[str, list[str]]:
    """Sorted tensor names of every leaf but "config", in leaf order; a leaf may have none."""
    blocks = [f"block.{index}" for index in range(num_blocks)]
    groups: dict[str, list[str]] = {leaf: [] for leaf in ("embedding", *blocks, "norm", "lm_head")}
    for name in sorted(names):
        # Blocks beyond the config's (multi-token prediction layers) belong to no part.
        groups.setdefault(leaf_of(name), []).append(name)
    return groups


def leaf_order(leaves: Iterable[str]) -> list[str]:
    """All leaf names of a complete manifest, in the order of the tree.

    Raises:
        ModelError: a name is unknown or one is missing.
    """
    names = set(leaves)
    unknown = sorted(name for name in names if not _LEAF.fullmatch(name))
    num_blocks = sum(name.startswith("block.") for name in names)
    blocks = [f"block.{index}" for index in range(num_blocks)]
    order = ["config", "embedding", *blocks, "norm", "lm_head"]
    missing = [name for name in order if name not in names]
    if unknown or missing:
        raise ModelError(f"manifest is incomplete: missing {missing}, unknown {unknown}")
    return order


def hash_leaf(items: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors, in hex; their order does not matter, one is held at a time.

    Each tensor's digest is SHA-256 over dtype, shape and bytes; the leaf's is SHA-256 over the
    name-sorted (name, digest) pairs. Every variable-length piece is preceded by its length.

    Args:
        items: (name, tensor) pairs as the checkpoint has them; any shape, on the CPU.

    Raises:
        ModelError: a name comes twice.
    """
    digests: dict[str, bytes] = {}
    for name, tensor in items:
        if name in digests:
            raise ModelError(f"tensor {name} comes twice in one leaf; the checkpoint is damaged")
        digests[name] = _hash_tensor(tensor)
    leaf = hashlib.sha256(b"cutlayer leaf 1")
    for name in sorted(digests):
        leaf.update(_prefixed(name.encode()) + digests[name])
    return leaf.hexdigest()


def hash_config(config: PreTrainedConfig) -> str:
    """SHA-256 in hex of the config fields that decide the computation, as canonical JSON."""
    fields = _deciding_fields(json.loads(config.to_json_string(use_diff=True)))
    return hashlib.sha256(b"cutlayer config 1" + canonical_json(fields)).hexdigest()


def manifest_of(folder: ModelFolder) -> Manifest:
    """Hash a whole model folder, one tensor in memory at a time.

    Raises:
        ModelError: a tensor cannot be read, or the checkpoint has more blocks than its config.
    """
    num_blocks = folder.config.num_hidden_layers
    leaves = {"config": hash_config(folder.config)}
    for leaf, names in names_by_leaf(folder.names(), num_blocks).items():
        leaves[leaf] = hash_leaf((name, folder.get(name)) for name in names)
    return Manifest(leaves)


def merge(mine: Manifest, theirs: Manifest) -> Manifest:
    """All leaves that either side knows; those that both know must be equal.

    Raises:
        SpecMismatch: names every leaf that differs, with the first digits of both hashes.
    """
    both = sorted(mine.leaves.keys() & theirs.leaves.keys())
    different = [name for name in both if mine.leaves[name] != theirs.leaves[name]]
    if different:
        listed = ", ".join(
            f"{name} (mine {mine.leaves[name][:12]}, theirs {theirs.leaves[name][:12]})"
            for name in different
        )
        raise SpecMismatch(f"the two sides hold different models: {listed}; use one checkpoint")
    return Manifest({**theirs.leaves, **mine.leaves})


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Write a complete manifest as `cutlayer-manifest.json`; returns the file.

    Raises:
        ModelError: the manifest is incomplete or the folder cannot be written.
    """
    path = folder / MANIFEST_NAME
    table = {"format": 1, "root": manifest.root(), "leaves": dict(manifest.leaves)}
    try:
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}") from error
    return path


def read_manifest(folder: Path) -> Manifest:
    """Read and check `cutlayer-manifest.json`.

    Raises:
        ModelError: missing, malformed, or its root does not follow from its leaves.
    """
    path = folder / MANIFEST_NAME
    try:
        table = json.loads(path.read_bytes())
        version, root = table["format"], table["root"]
        leaves = {str(name): bytes.fromhex(value).hex() for name, value in table["leaves"].items()}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a manifest ({error}); write it anew") from error
    manifest = Manifest(leaves)
    if version != 1 or root != manifest.root():
        raise ModelError(f"{path} is of another format or was changed by hand; write it anew")
    return manifest


def _hash_tensor(tensor: Tensor) -> bytes:
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = [len(tensor.shape), *tensor.shape]
    digest = hashlib.sha256(_prefixed(dtype.encode()))
    digest.update(b"".join(size.to_bytes(8, "little") for size in shape))
    digest.update(raw_bytes(tensor))
    return digest.digest()


def _prefixed(piece: bytes) -> bytes:
    return len(piece).to_bytes(8, "little") + piece


def _tree_hash(entries: list[bytes]) -> bytes:
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    split = 1 << (len(entries) - 1).bit_length() - 1
    left, right = _tree_hash(entries[:split]), _tree_hash(entries[split:])
    return hashlib.sha256(b"\x01" + left + right).digest()


def _deciding_fields(value: object) -> object:
    """Drop what decides nothing, in nested configs too; sub-configs carry the same fields."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if _decides(key)}
        return {key: _deciding_fields(item) for key, item in kept.items()}
    return [_deciding_fields(item) for item in value] if isinstance(value, list) else value


def _decides(field: str) -> bool:
    return field not in _NO_COMPUTATION and not field.endswith("_token_id")
