"""Masks: ring elements that look random and cancel, or that can be computed again and removed.

It does not know who survived. X25519 agrees on a key, HKDF-SHA256 binds it to its purpose, ChaCha20
stretches it; all three are the `cryptography` library's.

Shapes: M = values of a masked vector.
"""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.federation.secure.attempt import Attempt

__all__ = [
    "SECRET_BYTES",
    "add_pair_mask",
    "add_seed_mask",
    "add_stream",
    "agreed_key",
    "derived_key",
    "is_usable",
    "mask_key_of",
    "public_bytes",
]

SECRET_BYTES = 16
"""Of what is shared by Shamir's scheme: 128 bits, as strong as X25519; longer keys are derived."""

_CHUNK_VALUES = 1 << 16
"""Values masked at once; half a MiB stays in the processor's cache."""
_ZEROS = bytes(8 * _CHUNK_VALUES)


def derived_key(secret: bytes, binding: bytes) -> bytes:
    """A key of 32 bytes for the purpose that the binding names."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=binding).derive(secret)


def mask_key_of(secret: bytes, owner: str, attempt: Attempt) -> X25519PrivateKey:
    """A member's private mask key, from the secret that its neighbours can restore."""
    binding = attempt.binding("mask key", owner)
    return X25519PrivateKey.from_private_bytes(derived_key(secret, binding))


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The public half, as it travels."""
    return key.public_key().public_bytes_raw()


def is_usable(public: bytes) -> bool:
    """Whether these bytes are a public key that a secret can be agreed on with."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        return False
    return True


def agreed_key(own: X25519PrivateKey, theirs: bytes, peer: str, binding: bytes) -> bytes:
    """The key that two members agree on.

    Args:
        own: private key.
        theirs: the peer's public key, 32 bytes.
        peer: its name, for the error.
        binding: purpose, the same on both sides.

    Raises:
        ProtocolError: the peer's bytes are no usable key.
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise ProtocolError(f"{peer} sent a public key that is none; it must upgrade") from error
    return derived_key(secret, binding)


def add_pair_mask(
    total_M: Tensor, own: X25519PrivateKey, name: str, peer: tuple[str, bytes], attempt: Attempt
) -> None:
    """Add the mask that `name` has towards a peer; the peer's own is its negative.

    Args:
        total_M: int64, changed in place.
        own: private mask key of `name`.
        name: whose side.
        peer: name and public mask key of the other.
        attempt: what the mask is bound to.

    Raises:
        ProtocolError: the peer's bytes are no usable key.
    """
    other, public = peer
    first, second = sorted((name, other))
    key = agreed_key(own, public, other, attempt.binding("pair mask", first, second))
    add_stream(total_M, key, 1 if name == first else -1)


def add_seed_mask(total_M: Tensor, seed: bytes, name: str, attempt: Attempt, sign: int) -> None:
    """Add, or with sign -1 remove, a member's own mask, in place."""
    add_stream(total_M, derived_key(seed, attempt.binding("own mask", name)), sign)


def add_stream(total_M: Tensor, key: bytes, sign: int) -> None:
    """Add `sign` times a key stream to int64 values, in place and modulo 2^64.

    Args:
        total_M: int64 on the CPU, contiguous.
        key: 32 bytes, used for nothing else: the nonce is constant.
        sign: 1 or -1.
    """
    assert total_M.is_contiguous(), "a mask is added in place"
    values_M = total_M.numpy().view("<u8")
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    buffer = np.empty(min(_CHUNK_VALUES, len(values_M)), dtype="<u8")
    add = np.add if sign > 0 else np.subtract
    for begin in range(0, len(values_M), _CHUNK_VALUES):
        part = values_M[begin : begin + _CHUNK_VALUES]
        stream.update_into(memoryview(_ZEROS)[: part.nbytes], buffer[: len(part)].data.cast("B"))
        add(part, buffer[: len(part)], out=part)
