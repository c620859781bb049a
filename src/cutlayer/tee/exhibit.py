"""What one side shows the other: evidence, and the public key that this evidence vouches for.

It neither makes evidence (`challenge`) nor judges it (`verify`). The packed form is msgpack, typed
and strict, and small enough for a frame's header.
"""

import hashlib
from collections.abc import Mapping
from enum import StrEnum

import msgspec

from cutlayer.canonical import canonical_json
from cutlayer.tee.evidence import Evidence
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.untrusted import decode_untrusted

__all__ = [
    "MAX_PROOF_BYTES",
    "Exhibit",
    "Side",
    "pack_evidence",
    "session_digest",
    "unpack_evidence",
]

MAX_PROOF_BYTES = 960 << 10
"""A frame's header has one MiB; evidence of eight GPUs with chains fits."""
_KEY_BYTES = 32
_ENCODER = msgspec.msgpack.Encoder()
_EVIDENCE = msgspec.msgpack.Decoder(Evidence)


class Side(StrEnum):
    """Whose evidence it is: one side's must not pass for the other's."""

    CLIENT = "client"
    SERVER = "server"


class Exhibit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Travels in WELCOME and EVIDENCE as bytes."""

    evidence: Evidence
    sealing_key: bytes
    """X25519 public key, 32 bytes; keys are released to it (`key_release`)."""

    def pack(self) -> bytes:
        """As it travels.

        Raises:
            AttestationError: too large for a frame; this machine's evidence cannot be sent.
        """
        data = _ENCODER.encode(self)
        if len(data) > MAX_PROOF_BYTES:
            raise refused(
                Refusal.MALFORMED, f"own evidence has {len(data)} bytes, too many to send"
            )
        return data

    @classmethod
    def unpack(cls, proof: bytes) -> "Exhibit":
        """From a peer.

        Raises:
            AttestationError: none, malformed or too large.
        """
        if not proof:
            raise refused(Refusal.NO_EVIDENCE, "the peer proves nothing of what it runs")
        if len(proof) > MAX_PROOF_BYTES:
            raise refused(Refusal.MALFORMED, f"evidence of {len(proof)} bytes is too large")
        found = decode_untrusted(_EXHIBIT.decode, proof, "the peer's evidence cannot be read")
        if len(found.sealing_key) != _KEY_BYTES:
            raise refused(Refusal.MALFORMED, "the peer's public key has another length than 32")
        return found


_EXHIBIT = msgspec.msgpack.Decoder(Exhibit)


def pack_evidence(evidence: Evidence) -> bytes:
    """Evidence alone, as a certificate carries it."""
    return _ENCODER.encode(evidence)


def unpack_evidence(data: bytes) -> Evidence:
    """Evidence from a peer's certificate.

    Raises:
        AttestationError: malformed.
    """
    return decode_untrusted(_EVIDENCE.decode, data, "the certificate's evidence")


def session_digest(spec: Mapping[str, str | int], side: Side, sealing_key: bytes) -> bytes:
    """`Binding.spec_digest` of a connection: SHA-256 of the agreed spec, the side and its key.

    Args:
        spec: as it travels in HELLO.
        side: whose evidence it is.
        sealing_key: that side's X25519 public key.
    """
    claims = {"key": sealing_key.hex(), "side": side.value, "spec": dict(spec)}
    return hashlib.sha256(b"cutlayer session 1\0" + canonical_json(claims)).digest()
