"""Counter-based noise: the same key always gives the same bytes, and only the owner has the key.

It does not know mechanisms or scales (`mechanism`) and decides nothing about what leaves
(`boundary`). Nothing here draws from a state that advances: a repeated release finds its old noise
again and costs nothing, and a release of anything else meets noise that was never used before.

Shapes: N = vectors of all rows together, D = values of one vector.
"""

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from cutlayer.errors import StorageError
from cutlayer.storage.files import read_private, write_atomic
from cutlayer.storage.vault import NoVault, Vault

__all__ = ["Noise", "NoiseContext", "RowNoise", "RunSecret", "release_key", "standard_normals"]

_SECRET_BYTES = 32
_NONCE = bytes(16)
_NOISE_DOMAIN = b"cutlayer noise 1"
_RELEASE_DOMAIN = b"cutlayer release key 1"
_ROW_DOMAIN = b"cutlayer ledger row 1"
_RELEASE_KEY_BYTES = 16


class Noise(Protocol):
    """Where a mechanism takes its randomness from."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Vectors of each row that is noised, for rules that look at a row as a whole."""

    def standard_normal(self, num_vectors: int, width: int) -> Tensor:
        """Independent N(0, 1) values, float32 [num_vectors, width] on the CPU.

        A second call begins at the same values: take all that a release needs in one.
        """


@dataclass(frozen=True, kw_only=True)
class NoiseContext:
    """What a row's noise belongs to, beside the row itself. Any difference gives other noise."""

    boundary: str
    """Name of the boundary."""
    mechanism: str
    """Name and scale. Were they left out, two scales over one h would give h away: two equations
    in two unknowns."""
    version: str
    """Weights that made h."""


class RunSecret:
    """The 32 bytes that make a run's noise unpredictable. Never printed, compared or pickled."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != _SECRET_BYTES:
            raise StorageError(f"a run secret has {_SECRET_BYTES} bytes, got {len(key)}")
        self._key = key

    def __repr__(self) -> str:
        return "RunSecret(hidden)"

    def __reduce__(self) -> Never:
        raise TypeError("a RunSecret is not serialised; use save and load")

    @classmethod
    def new(cls) -> "RunSecret":
        """A fresh secret from the operating system."""
        return cls(os.urandom(_SECRET_BYTES))

    @classmethod
    def load(cls, path: Path, vault: Vault | None = None) -> "RunSecret":
        """Read a secret.

        Raises:
            StorageError: missing, open to others, of the wrong size, or sealed with another key.
        """
        vault = NoVault() if vault is None else vault
        key = vault.open(read_private(path), _file_context(path))
        if len(key) != _SECRET_BYTES:
            raise StorageError(
                f"{path} holds {len(key)} bytes where a run secret has {_SECRET_BYTES}; put the "
                "original back or start a new run"
            )
        return cls(key)

    def save(self, path: Path, vault: Vault | None = None) -> None:
        """Write the secret, mode 0600, on disk when this returns.

        Raises:
            StorageError: the file exists (another secret would draw new noise over old data), or
                it cannot be written.
        """
        if path.exists():
            raise StorageError(f"{path} exists; a run keeps one secret for ever")
        vault = NoVault() if vault is None else vault
        write_atomic(path, vault.seal(self._key, _file_context(path)), mode=0o600)

    def noise_key(
        self, context: NoiseContext, row_id: str, start: int, h: np.ndarray, places: bytes = b""
    ) -> bytes:
        """The key of one row's noise, 32 bytes.

        Args:
            context: what the noise belongs to.
            row_id: name of the row within its run.
            start: position of the row's first vector, in tokens.
            h: the row's vectors before noise, float32 [length, D], contiguous; those that leave.
            places: which of the row's vectors they are; empty where it is all of them.
        """
        names = (context.boundary, context.mechanism, context.version, row_id)
        fields = [_NOISE_DOMAIN, *(name.encode() for name in names)]
        fields += [str(start).encode(), str(h.shape).encode(), hashlib.sha256(h.data).digest()]
        fields += [places] if places else []
        return hmac.digest(self._key, _joined(fields), "sha256")

    def row_digest(self, row_id: str) -> str:
        """Name of a row in the ledger, 32 hex digits, the same in every version of the weights.

        Who has not the secret cannot test a guess of the row's name.
        """
        digest = hmac.digest(self._key, _joined([_ROW_DOMAIN, row_id.encode()]), "sha256")
        return digest[:_RELEASE_KEY_BYTES].hex()


class RowNoise:
    """Noise of packed rows, each from its own key."""

    def __init__(self, keys: Sequence[bytes], lengths: Sequence[int]) -> None:
        """
        Args:
            keys: one noise key per row.
            lengths: vectors per row.
        """
        self._rows = list(zip(keys, lengths, strict=True))

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `Noise`."""
        return tuple(length for _, length in self._rows)

    def standard_normal(self, num_vectors: int, width: int) -> Tensor:
        """See `Noise`; `num_vectors` is the sum of the lengths."""
        assert num_vectors == sum(length for _, length in self._rows)
        noise_ND = np.empty((num_vectors, width), np.float32)
        begin = 0
        for key, length in self._rows:
            normals = standard_normals(key, length * width)
            noise_ND[begin : begin + length] = normals.reshape(length, width)
            begin += length
        return torch.from_numpy(noise_ND)


def release_key(noise_key: bytes) -> str:
    """Name of a release in the ledger, 32 hex digits; tells nothing about the noise or the row."""
    return hmac.digest(noise_key, _RELEASE_DOMAIN, "sha256")[:_RELEASE_KEY_BYTES].hex()


def standard_normals(key: bytes, count: int) -> np.ndarray:
    """Independent N(0, 1) values that depend on nothing but the key.

    ChaCha20 keystream -> two uniforms of 53 bits in (0, 1) -> Box-Muller in float64 -> float32.
    The largest possible value is 8.6.

    Args:
        key: 32 bytes, used for this call alone.
        count: how many.

    Source: Box and Muller, A Note on the Generation of Random Normal Deviates (1958);
        RFC 8439 for ChaCha20.
    """
    num_pairs = (count + 1) // 2
    encryptor = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
    words = np.frombuffer(encryptor.update(bytes(16 * num_pairs)), dtype="<u8")
    # Half a step above the grid: log(0) cannot happen.
    uniforms = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniforms[:num_pairs]))
    angle = (2.0 * np.pi) * uniforms[num_pairs:]
    normals = np.empty(2 * num_pairs, np.float32)
    normals[:num_pairs] = radius * np.cos(angle)
    normals[num_pairs:] = radius * np.sin(angle)
    return normals[:count]


def _joined(fields: Sequence[bytes]) -> bytes:
    # Length prefixes: no two different lists of fields may give the same bytes.
    return b"".join(len(field).to_bytes(8, "big") + field for field in fields)


def _file_context(path: Path) -> str:
    return f"{path.name} of {path.parent.name}"
