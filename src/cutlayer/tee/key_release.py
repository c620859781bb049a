"""Keys for attested places alone: sealed to the public key that accepted evidence vouches for.

It does not judge evidence: whoever releases holds an `Accepted` place. Nor does it store keys or
say what they open.

Source: HPKE (RFC 9180), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from cutlayer.canonical import canonical_json
from cutlayer.tee.exhibit import Side
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.untrusted import decode_untrusted
from cutlayer.tee.verify import AttestationResult

__all__ = [
    "Accepted",
    "Grant",
    "SealedKey",
    "SealingKey",
    "adapter_job",
    "measurement_digest",
    "named_job",
    "release",
]

_SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_LABEL = b"cutlayer key release 1\0"
_MAX_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A place whose evidence was fresh, bound and to the policy; only a verdict makes one."""

    result: AttestationResult
    side: Side
    sealing_key: bytes
    """Its X25519 public key, bound into the evidence."""


class Grant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For what a key is given; all of it is authenticated with the key."""

    measurement: str
    """`measurement_digest` of the place that was accepted."""
    side: Side
    """Of the receiver."""
    job: str
    """What the key is for, such as `adapters of clinic-a`."""
    expires_at_s: int
    """Unix time after which the receiver must not open it."""

    def info(self) -> bytes:
        """HPKE's `info`: canonical, under a label of this protocol."""
        return _LABEL + canonical_json(msgspec.to_builtins(self))


class SealedKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As it travels: the grant in the clear, the key sealed."""

    grant: Grant
    sealed: bytes


_DECODER = msgspec.msgpack.Decoder(SealedKey)


class SealingKey:
    """A fresh key pair of this process; the private half is never written nor shown."""

    def __init__(self) -> None:
        self._private = X25519PrivateKey.generate()
        self._public = self._private.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"SealingKey(public={self._public.hex()})"

    @property
    def public(self) -> bytes:
        """32 bytes, to be bound into evidence."""
        return self._public

    def open(
        self, data: bytes, side: Side, job: str, at: datetime, measurement: str | None = None
    ) -> bytes:
        """The key that was sealed for this place.

        Args:
            data: from `release`.
            side: this one.
            job: what the key must be for.
            at: the time, UTC.
            measurement: this place's own digest, where it knows it.

        Raises:
            AttestationError: malformed, for another key, side, job or measurement, or expired.
        """
        found = _read(data)
        _check_grant(found.grant, side, job, at, measurement)
        try:
            return _SUITE.decrypt(found.sealed, self._private, info=found.grant.info())
        except (InvalidTag, ValueError) as error:
            raise refused(
                Refusal.WRONG_BINDING, "the key was sealed to another place, or changed on the way"
            ) from error


def release(key: bytes, place: Accepted, job: str, expires_at: datetime) -> bytes:
    """Seal a key to an accepted place.

    Args:
        key: what is given away.
        place: the receiver.
        job: what the key is for.
        expires_at: until when it may be opened, UTC.

    Raises:
        AttestationError: the receiver's public key is none.
    """
    grant = Grant(
        measurement=measurement_digest(place.result.claims.measurements),
        side=place.side,
        job=job,
        expires_at_s=int(expires_at.timestamp()),
    )
    try:
        public = X25519PublicKey.from_public_bytes(place.sealing_key)
        sealed = _SUITE.encrypt(key, public, info=grant.info())
    except ValueError as error:
        raise refused(Refusal.MALFORMED, "the peer's public key cannot be sealed to") from error
    return msgspec.msgpack.encode(SealedKey(grant=grant, sealed=sealed))


def adapter_job(owner: str) -> str:
    """The job of a key that seals an owner's trunk adapters at the server."""
    return f"adapters of {owner}"


def named_job(name: str) -> str:
    """The job of a key that a server releases by name."""
    return f"key {name}"


def measurement_digest(measurements: Mapping[str, str]) -> str:
    """SHA-256, hex, over all that a place measured."""
    return hashlib.sha256(canonical_json(dict(measurements))).hexdigest()


def _read(data: bytes) -> SealedKey:
    if len(data) > _MAX_BYTES:
        raise refused(Refusal.MALFORMED, f"a sealed key of {len(data)} bytes")
    return decode_untrusted(_DECODER.decode, data, "this is no sealed key")


def _check_grant(grant: Grant, side: Side, job: str, at: datetime, measurement: str | None) -> None:
    if grant.side is not side:
        raise refused(Refusal.WRONG_BINDING, f"the key is for a {grant.side}, this is a {side}")
    if grant.job != job:
        raise refused(Refusal.WRONG_BINDING, f"the key is for {grant.job!r:.80}, not for {job!r}")
    if measurement is not None and not hmac.compare_digest(grant.measurement, measurement):
        raise refused(Refusal.WRONG_MEASUREMENT, "the key is for other software than this")
    if at.timestamp() > grant.expires_at_s:
        end = datetime.fromtimestamp(min(max(grant.expires_at_s, 0), 1 << 33), UTC)
        raise refused(
            Refusal.EXPIRED, f"the key was released until {end:%Y-%m-%d %H:%M:%S} UTC; ask again"
        )
