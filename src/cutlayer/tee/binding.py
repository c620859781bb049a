"""What evidence is bound to: the TLS key at the door, the verifier's nonce, the agreed spec.

It hashes; who compares is the policy (constant time).
"""

import hashlib
from dataclasses import dataclass

import cbor2

__all__ = ["Binding"]


@dataclass(frozen=True, kw_only=True)
class Binding:
    """Evidence for other values is refused as `wrong-binding`."""

    tls_key_sha256: bytes
    """SHA-256 of the DER SubjectPublicKeyInfo of the attester's TLS key."""
    nonce: bytes
    """32 bytes that the verifier drew for this challenge; empty within a certificate."""
    spec_digest: bytes
    """SHA-256 of the agreed `Spec` and of the role; empty before the specs are known."""

    def report_data(self) -> bytes:
        """SHA-256 over the deterministic CBOR of the three, under a label of this protocol."""
        claims = {
            "cutlayer": "binding 1",
            "key": self.tls_key_sha256,
            "nonce": self.nonce,
            "spec": self.spec_digest,
        }
        return hashlib.sha256(cbor2.dumps(claims, canonical=True)).digest()
