"""The mode in which the sum stays hidden from the server too: pads under a key of the members.

It does not mask members from each other (`member` does, over the padded values): whoever holds the
group key can remove every pad. It never sends, prints or logs that key.

Shapes: M = values of a masked vector, the weight included.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from secrets import token_bytes

import msgspec
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cutlayer.errors import PermissionRefused, ProtocolError, StorageError
from cutlayer.federation.secure.masks import add_stream, derived_key
from cutlayer.storage.files import read_private, write_atomic

__all__ = ["GroupKey", "open_state", "pad", "seal_state"]

_KEY_BYTES = 32
_NONCE_BYTES = 12


class GroupKey:
    """The key that all members of a federation have and its server has not."""

    def __init__(self, secret: bytes) -> None:
        """Take 32 secret bytes."""
        assert len(secret) == _KEY_BYTES
        self._secret = secret

    @classmethod
    def create(cls, path: Path) -> "GroupKey":
        """Make a key and write it, mode 0600; carry the file to every member, never to the server.

        Raises:
            StorageError: the file exists (a key is never overwritten) or cannot be written.
        """
        if path.exists():
            raise StorageError(f"{path} exists and a key is never overwritten; move it away first")
        secret = token_bytes(_KEY_BYTES)
        write_atomic(path, secret)
        return cls(secret)

    @classmethod
    def read(cls, path: Path) -> "GroupKey":
        """Read the members' key.

        Raises:
            StorageError: missing, open to others, or not a group key.
        """
        secret = read_private(path)
        if len(secret) != _KEY_BYTES:
            raise StorageError(
                f"{path} holds {len(secret)} bytes, a group key has {_KEY_BYTES}; get it again "
                "from the member that made it"
            )
        return cls(secret)

    @property
    def fingerprint(self) -> str:
        """For comparison by people: derived from the key, and no way back to it."""
        digits = self.derived("fingerprint").hex()
        return " ".join(digits[at : at + 4] for at in range(0, 32, 4))

    def __repr__(self) -> str:
        """Never the key."""
        return "GroupKey(hidden)"

    def derived(self, purpose: str, *parts: str | int) -> bytes:
        """A key for one purpose."""
        return derived_key(self._secret, _binding(purpose, *parts))


def pad(
    key: GroupKey, federation: str, round_number: int, attempt: int, member: str, count: int
) -> Tensor:
    """What a member adds to its vector before masking, int64 [M].

    Trap: two vectors under one pad would tell the server their difference, so a member never sends
    two updates under one round and attempt.

    Args:
        key: the members'.
        federation: its name.
        round_number: of the update.
        attempt: of the round.
        member: whose pad.
        count: M.
    """
    pad_M = torch.zeros(count, dtype=torch.int64)
    add_stream(pad_M, key.derived("pad", federation, round_number, attempt, member), 1)
    return pad_M


def seal_state(
    key: GroupKey, federation: str, round_number: int, digest: str, state: Mapping[str, Tensor]
) -> bytes:
    """Encrypt the adapters that a round began with, for members that come later.

    Args:
        key: the members'.
        federation: its name.
        round_number: the round that began with this state.
        digest: the chain's end at that time; a reader that knows it can demand it.
        state: adapters by key.
    """
    nonce, binding = token_bytes(_NONCE_BYTES), _binding("state", federation, round_number)
    tensors = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    told = digest.encode()
    data = struct.pack("<I", len(told)) + told + save(tensors)
    sealed = AESGCM(key.derived("state", federation, round_number)).encrypt(nonce, data, binding)
    return nonce + sealed


def open_state(
    key: GroupKey, federation: str, round_number: int, sealed: bytes, digest: str | None = None
) -> dict[str, Tensor]:
    """Decrypt what `seal_state` made for that round.

    Args:
        key: the members'.
        federation: its name.
        round_number: the round that began with this state.
        sealed: as it came.
        digest: what the chain's end must have been; None accepts any.

    Raises:
        PermissionRefused: another key, federation, round or digest, or the bytes were changed.
        ProtocolError: a member sealed something that is no state.
    """
    binding = _binding("state", federation, round_number)
    cipher = AESGCM(key.derived("state", federation, round_number))
    where = f"the sealed adapters of round {round_number} of {federation}"
    try:
        data = cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], binding)
    except (InvalidTag, ValueError) as error:
        raise PermissionRefused(
            f"{where} do not open: this member has another group key than the one that sealed "
            "them, or they were changed; compare federation.group_key_file"
        ) from error
    size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else len(data)
    if digest is not None and data[4 : 4 + size] != digest.encode():
        raise PermissionRefused(f"{where} belong to another history of the federation")
    try:
        state: dict[str, Tensor] = load(data[4 + size :])
    except SafetensorError as error:
        raise ProtocolError(f"{where} hold no adapters; a member sent them so") from error
    return state


def _binding(purpose: str, *parts: str | int) -> bytes:
    return msgspec.msgpack.encode(["cutlayer group key", purpose, *parts])
