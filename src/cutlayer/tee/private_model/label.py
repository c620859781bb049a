"""What stands in the clear beside sealed weights: which part, which key, digests. No weights.

It seals nothing (`sealed_part`, `sealed_adapter`). On disk it is `sealed.json`.
"""

import hashlib
import re
from enum import StrEnum
from pathlib import Path

import msgspec

from cutlayer.canonical import canonical_json
from cutlayer.errors import ModelError
from cutlayer.storage.files import write_atomic

__all__ = ["LABEL_NAME", "Label", "What", "is_sealed", "key_id_of", "read_label", "write_label"]

LABEL_NAME = "sealed.json"
_MAX_BYTES = 64 << 10
_DIGEST = re.compile(r"[0-9a-f]{64}")


class What(StrEnum):
    """What an owner may declare private."""

    WEIGHTS = "weights"
    """Of a part."""
    ADAPTER = "adapter"


class Label(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Public; every sealed piece is bound to its digest, so none can be moved below another."""

    format: int = 1
    what: What
    content: str
    """SHA-256, hex, of what is sealed: of a part's manifest leaves, or of an adapter's files."""
    key_id: str
    """Names the key, 16 hex digits; says nothing about it."""
    part: str = ""
    """head, trunk or tail; empty for an adapter."""
    lower: int = 0
    """First block of the trunk."""
    upper: int = 0
    """Block after the trunk's last."""

    @property
    def digest(self) -> str:
        """SHA-256 over all of it, hex: the name under which its key is kept and released."""
        canonical = canonical_json(msgspec.to_builtins(self))
        return hashlib.sha256(b"cutlayer sealed label 1\0" + canonical).hexdigest()

    @property
    def job(self) -> str:
        """For what its key is released (`key_release`)."""
        return f"sealed {self.what} {self.digest}"

    def context(self, name: str) -> str:
        """What a sealed piece of this name is bound to."""
        return f"sealed {self.what} {self.digest} {name}"


def is_sealed(folder: str | Path) -> bool:
    """Whether a model's name is that of a sealed folder."""
    return (Path(folder).expanduser() / LABEL_NAME).is_file()


def key_id_of(key: bytes) -> str:
    """A key's public name."""
    return hashlib.sha256(b"cutlayer model key id\0" + key).hexdigest()[:16]


def write_label(folder: Path, label: Label) -> None:
    """Write `sealed.json`, readable by everybody.

    Raises:
        StorageError: the folder cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(label), indent=1) + b"\n"
    write_atomic(folder / LABEL_NAME, data, mode=0o644)


def read_label(folder: Path) -> Label:
    """Read and check `sealed.json`.

    Raises:
        ModelError: missing or malformed.
    """
    path = folder / LABEL_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{folder} holds nothing sealed ({path}: {error.strerror})") from error
    if len(data) > _MAX_BYTES:
        raise ModelError(f"{path} is too large for a label; copy the sealed folder again")
    try:
        label = msgspec.json.decode(data, type=Label)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is no label: {error}; copy the sealed folder again") from error
    if label.format != 1 or not _DIGEST.fullmatch(label.content):
        raise ModelError(f"{path} is of another format than 1 or was changed; copy it again")
    return label
