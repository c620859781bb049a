"""Secrets in shares, shares in envelopes.

It does not decide who may open what (`member`, `server`). Shamir's scheme over GF(2^128) is
pycryptodome's; envelopes are ChaCha20-Poly1305 of `cryptography`, each under a key of its own.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random

import msgspec
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.masks import SECRET_BYTES, derived_key

__all__ = [
    "NO_BUNDLE",
    "Bundle",
    "Secrets",
    "join",
    "open_envelope",
    "seal_envelope",
    "seed_digest",
    "split",
    "unlock_key",
]

_NONCE = bytes(12)
"""Constant: every envelope has a key that seals nothing else."""
_MAX_DRAWS = 150
"""Subsets of shares that are drawn when several are wrong; any one wrong share is found before."""

_Point = tuple[int, bytes]
"""Number of the holder, from 1, and its share."""


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """What a member makes afresh for each attempt; 16 bytes each."""

    seed: bytes
    """Of its own mask."""
    key: bytes
    """Of its private mask key."""
    unlock: bytes
    """Of what it reveals in the end: opens it only if enough neighbours saw the member survive."""


class Bundle(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One holder's shares of one member's secrets."""

    seed: bytes
    key: bytes
    unlock: bytes
    seed_digest: bytes
    """By which the server knows the right seed when a holder lies."""

    def has_sizes_of(self, other: "Bundle") -> bool:
        """Whether each entry is as long as the other's."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return all(len(own) == len(theirs) for own, theirs in pairs)


NO_BUNDLE = Bundle(
    seed=bytes(SECRET_BYTES),
    key=bytes(SECRET_BYTES),
    unlock=bytes(SECRET_BYTES),
    seed_digest=bytes(hashlib.sha256().digest_size),
)
"""What a holder has of a member that gave it nothing of use; the server finds it wrong."""


def split(secrets: Secrets, owner: str, attempt: Attempt) -> dict[str, Bundle]:
    """Shares of a member's secrets, by holder (the member itself is one)."""
    holders, threshold = attempt.graph.holders(owner), attempt.threshold
    shares = [
        [share for _, share in Shamir.split(threshold, len(holders), secret)]
        for secret in (secrets.seed, secrets.key, secrets.unlock)
    ]
    digest = seed_digest(secrets.seed, owner, attempt)
    return {
        holder: Bundle(seed=seed, key=key, unlock=unlock, seed_digest=digest)
        for holder, seed, key, unlock in zip(holders, *shares, strict=True)
    }


def join(
    shares: Mapping[str, bytes],
    owner: str,
    attempt: Attempt,
    is_right: Callable[[bytes], bool],
) -> bytes | None:
    """The secret, or None if no subset of the shares gives one that is right.

    Args:
        shares: by holder, at least the threshold.
        owner: whose secret.
        attempt: says who holds which share.
        is_right: recognises the secret; wrong shares are survived while there are spare ones.
    """
    numbers = {holder: at for at, holder in enumerate(attempt.graph.holders(owner), start=1)}
    points = [(numbers[holder], share) for holder, share in sorted(shares.items())]
    for subset in _subsets(points, attempt.threshold):
        secret = Shamir.combine(subset)
        if is_right(secret):
            return secret
    return None


def seal_envelope(key: bytes, data: bytes, binding: bytes) -> bytes:
    """Encrypt under a key that was derived for this one envelope."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, data, binding)


def open_envelope(key: bytes, sealed: bytes, binding: bytes) -> bytes | None:
    """What was sealed; None if it was changed or sealed for another purpose."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, binding)
    except InvalidTag:
        return None


def unlock_key(unlock: bytes, binding: bytes) -> bytes:
    """Key of one entry of UNMASK."""
    return derived_key(unlock, binding)


def seed_digest(seed: bytes, owner: str, attempt: Attempt) -> bytes:
    """By which a seed is recognised; it tells nothing of it, for a seed has 128 random bits."""
    return hashlib.sha256(attempt.binding("seed", owner, seed)).digest()


def _subsets(points: Sequence[_Point], size: int) -> Iterator[list[_Point]]:
    """The first alone is needed unless somebody lied: windows leave each holder out, then draws."""
    usable = [point for point in points if len(point[1]) == SECRET_BYTES]
    if len(usable) < size:
        return
    for begin in range(len(usable) if len(usable) > size else 1):
        yield (usable[begin:] + usable[:begin])[:size]
    draws = Random(0)
    for _ in range(_MAX_DRAWS if len(usable) > size + 1 else 0):
        yield draws.sample(usable, size)
