"""Optional encryption at rest: bytes in, bytes out, bound to a context.

It does not write files and does not protect a running process: who reads its memory or its
environment has the key. Sealed form: b"CLV1", key id (8 bytes), salt (32), then 64 MiB chunks of
AES-256-GCM under HKDF-SHA256(key, salt, context), nonce = chunk number (11 bytes) + last flag (1).
A fresh derived key per sealed value means that no nonce is ever used twice with one key; number
and last flag mean that chunks can be neither swapped nor dropped (the STREAM construction).

Source: Hoang, Reyhanitabar, Rogaway, Vizar: Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance (CRYPTO 2015), section 7.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cutlayer.errors import StorageError
from cutlayer.storage.files import read_private, write_atomic

__all__ = [
    "AesVault",
    "NoVault",
    "Vault",
    "is_sealed",
    "key_from_hex",
    "new_key_file",
    "open_run_vault",
    "open_vault",
]

_MAGIC = b"CLV1"
_ID_BYTES, _SALT_BYTES, _TAG_BYTES, _KEY_BYTES = 8, 32, 16, 32
_HEADER_BYTES = len(_MAGIC) + _ID_BYTES + _SALT_BYTES
_CHUNK_BYTES = 64 << 20


class Vault(Protocol):
    """What storage calls before it writes and after it reads."""

    def seal(self, data: bytes, context: str) -> bytes:
        """The form of `data` that goes to disk; `context` must be given again to open it."""

    def open(self, sealed: bytes, context: str) -> bytes:
        """What was sealed under the same key and context, or StorageError."""


class NoVault:
    """Stores plain bytes; refuses sealed ones."""

    def seal(self, data: bytes, context: str) -> bytes:
        """`data` as it is."""
        return data

    def open(self, sealed: bytes, context: str) -> bytes:
        """`sealed` as it is.

        Raises:
            StorageError: it was sealed with a key.
        """
        if is_sealed(sealed):
            raise StorageError(f"{context} is encrypted; set the storage key that sealed it")
        return sealed


class AesVault:
    """AES-256-GCM with a key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise StorageError(f"a storage key has {_KEY_BYTES} bytes, got {len(key)}")
        self._key = key
        self._key_id = hashlib.sha256(b"cutlayer vault key id\0" + key).digest()[:_ID_BYTES]

    def __repr__(self) -> str:
        return f"AesVault(key_id={self._key_id.hex()})"

    def seal(self, data: bytes, context: str) -> bytes:
        """Encrypt; the context is authenticated and not stored."""
        salt = secrets.token_bytes(_SALT_BYTES)
        cipher = self._cipher(salt, context)
        parts = [_MAGIC, self._key_id, salt]
        view = memoryview(data)
        last = max(0, -(-len(data) // _CHUNK_BYTES) - 1)
        for number in range(last + 1):
            chunk = view[number * _CHUNK_BYTES : (number + 1) * _CHUNK_BYTES]
            parts.append(cipher.encrypt(_nonce(number, number == last), chunk, None))
        return b"".join(parts)

    def open(self, sealed: bytes, context: str) -> bytes:
        """Decrypt and verify.

        Raises:
            StorageError: not sealed, sealed with another key, changed, cut short, or moved here
                from another context.
        """
        if not is_sealed(sealed):
            raise StorageError(f"{context} is not encrypted but a storage key is set")
        key_id = sealed[len(_MAGIC) : len(_MAGIC) + _ID_BYTES]
        if not hmac.compare_digest(key_id, self._key_id):
            raise StorageError(
                f"{context} was sealed with key {key_id.hex()}, not with {self._key_id.hex()}; "
                "set the storage key that sealed it"
            )
        return self._open_chunks(sealed, context)

    def _open_chunks(self, sealed: bytes, context: str) -> bytes:
        cipher = self._cipher(sealed[_HEADER_BYTES - _SALT_BYTES : _HEADER_BYTES], context)
        view = memoryview(sealed)[_HEADER_BYTES:]
        step = _CHUNK_BYTES + _TAG_BYTES
        last = max(0, -(-len(view) // step) - 1)
        try:
            return b"".join(
                cipher.decrypt(_nonce(n, n == last), view[n * step : (n + 1) * step], None)
                for n in range(last + 1)
            )
        except InvalidTag as error:
            raise StorageError(
                f"{context} was changed, cut short or moved since it was sealed; restore a copy"
            ) from error

    def _cipher(self, salt: bytes, context: str) -> AESGCM:
        info = b"cutlayer vault 1\0" + context.encode()
        return AESGCM(HKDF(SHA256(), _KEY_BYTES, salt, info).derive(self._key))


def open_vault(key_file: Path | None = None, key_variable: str | None = None) -> Vault:
    """The vault for a key in a private file or in an environment variable; NoVault for neither.

    Args:
        key_file: 64 hex digits, mode 0600.
        key_variable: NAME of the environment variable that holds 64 hex digits; never the key.

    Raises:
        StorageError: both are given, the file is open to others, or the key is malformed.
    """
    if key_file is not None and key_variable is not None:
        raise StorageError("storage key: give a key file or a variable, not both")
    if key_file is not None:
        return AesVault(_parse_key(read_private(key_file), f"key file {key_file}"))
    if key_variable is None:
        return NoVault()
    text = os.environ.get(key_variable)
    if text is None:
        raise StorageError(f"storage key: environment variable {key_variable} is not set")
    return AesVault(_parse_key(text.encode(), f"environment variable {key_variable}"))


def new_key_file(path: Path) -> None:
    """Write a fresh key, mode 0600. Without it nothing that it sealed can be read again.

    Raises:
        StorageError: the file exists, or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path} exists; a new key would make what it sealed unreadable")
    write_atomic(path, secrets.token_hex(_KEY_BYTES).encode() + b"\n")


def open_run_vault(folder: Path, owner: Vault) -> Vault:
    """A vault of one run, whose own key lies in `folder/vault.key`, sealed by the owner's vault.

    Deleting that one small file makes the run unreadable and no other run (see `purge`).
    Without encryption (`NoVault`) no key is made.
    """
    if isinstance(owner, NoVault) and not (folder / "vault.key").exists():
        return owner
    path, context = folder / "vault.key", f"run key of {folder.name}"
    if not path.exists():
        write_atomic(path, owner.seal(secrets.token_bytes(_KEY_BYTES), context))
    return AesVault(owner.open(read_private(path), context))


def is_sealed(data: bytes) -> bool:
    """Whether `data` has the form of a sealed value."""
    return data[: len(_MAGIC)] == _MAGIC and len(data) >= _HEADER_BYTES + _TAG_BYTES


def key_from_hex(text: bytes) -> bytearray:
    """A key as its file holds it; the caller may wipe it.

    Raises:
        ValueError: what it must hold, to be put after the file's name.
    """
    try:
        key = bytearray.fromhex(text.decode("ascii").strip())
    except ValueError as error:
        raise ValueError(f"must hold {2 * _KEY_BYTES} hex digits") from error
    if len(key) != _KEY_BYTES:
        raise ValueError(f"must hold {2 * _KEY_BYTES} hex digits, has {2 * len(key)}")
    return key


def _parse_key(text: bytes, where: str) -> bytes:
    try:
        return bytes(key_from_hex(text))
    except ValueError as error:
        raise StorageError(f"{where} {error}") from error


def _nonce(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([is_last])
