"""An exported adapter's files (PEFT form) as one sealed file, opened in memory alone.

It does not read what is in them nor apply it to a part.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cutlayer.errors import ModelError
from cutlayer.storage.files import explain_os_errors, replace_folder, write_atomic
from cutlayer.storage.vault import AesVault
from cutlayer.tee.private_model.label import Label, What, key_id_of, read_label, write_label

__all__ = ["open_adapter", "read_adapter_files", "seal_adapter"]

_FILES = "adapter.sealed"
_MAX_BYTES = 4 << 30


def read_adapter_files(folder: Path) -> dict[str, bytes]:
    """The plain files of an exported adapter.

    Raises:
        ModelError: it is no adapter folder.
        StorageError: a file cannot be read.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} has no adapter_config.json; name a folder of `cutlayer export`")
    with explain_os_errors(f"read {folder}"):
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def seal_adapter(files: Mapping[str, bytes], out: Path, key: bytes) -> Label:
    """Write files, sealed.

    Args:
        files: by name.
        out: folder to write, replaced as a whole.
        key: 32 random bytes, of this adapter alone.

    Raises:
        ModelError: more than 4 GiB.
        StorageError: the folder cannot be written.
    """
    if sum(map(len, files.values())) > _MAX_BYTES:
        raise ModelError("an adapter of more than 4 GiB is sealed as a part of a merged model")
    label = Label(what=What.ADAPTER, content=_digest(files), key_id=key_id_of(key))
    plain = msgspec.msgpack.encode(dict(files))

    def fill(target: Path) -> None:
        sealed = AesVault(key).seal(plain, label.context(_FILES))
        write_atomic(target / _FILES, sealed, mode=0o644)
        write_label(target, label)

    replace_folder(out, fill)
    return label


def open_adapter(folder: Path, key: bytes) -> dict[str, bytes]:
    """The files, in memory.

    Raises:
        ModelError: not a sealed adapter.
        StorageError: another key, or the file was changed or cut short.
    """
    label = read_label(folder)
    if label.what is not What.ADAPTER:
        raise ModelError(f"{folder} holds a sealed part, not an adapter")
    path = folder / _FILES
    with explain_os_errors(f"read {path}"):
        sealed = path.read_bytes()
    plain = AesVault(key).open(sealed, label.context(_FILES))
    try:
        files = msgspec.msgpack.decode(plain, type=dict[str, bytes])
    except msgspec.DecodeError as error:
        raise ModelError(f"{path} is of another version; seal the adapter again") from error
    if _digest(files) != label.content:
        raise ModelError(f"{path} holds other files than its label says; seal the adapter again")
    return files


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(b"cutlayer sealed files 1\0")
    for name in sorted(files):
        for piece in (name.encode(), files[name]):
            digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()
