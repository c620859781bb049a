"""A Nitro security module of the tests' own: documents under a root that a policy may name."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import cbor2
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cutlayer.tee.evidence import Evidence, Platform
from tests.unit.tee.authorities import AT, Authority, Wish, ec_key, issue

ES384_HEADER = cbor2.dumps({1: -35})
PCR0 = b"\x0a" * 48


@dataclass(frozen=True, kw_only=True)
class Module:
    """Root, one authority between, and the module's key."""

    root: Authority = field(default_factory=lambda: issue("aws.nitro-enclaves", ec_key()))
    key: ec.EllipticCurvePrivateKey = field(default_factory=ec_key)

    def payload(self, change: Mapping[str, object] | None = None) -> dict[str, object]:
        """The map of a good document, and what a test changes in it."""
        between = issue("zonal", ec_key(), self.root, Wish(path_length=0))
        leaf = issue("i-1-enc2", self.key, between, Wish(is_authority=False))
        pcrs = {index: bytes(48) for index in range(16)} | {0: PCR0}
        good = {
            "module_id": "i-1-enc2",
            "digest": "SHA384",
            "timestamp": int(AT.timestamp() * 1000),
            "pcrs": pcrs,
            "certificate": leaf.der,
            "cabundle": [self.root.der, between.der],
            "public_key": None,
            "user_data": bytes(range(32)),
            "nonce": None,
        }
        return good | dict(change or {})

    def document(self, payload: object, header: bytes = ES384_HEADER) -> bytes:
        """COSE_Sign1 over the payload."""
        encoded = payload if isinstance(payload, bytes) else cbor2.dumps(payload)
        signed = cbor2.dumps(["Signature1", header, b"", encoded])
        r, s = decode_dss_signature(self.key.sign(signed, ec.ECDSA(hashes.SHA384())))
        return cbor2.dumps([header, {}, encoded, r.to_bytes(48) + s.to_bytes(48)])

    def evidence(self, change: Mapping[str, object] | None = None) -> Evidence:
        return Evidence(platform=Platform.NITRO, body=self.document(self.payload(change)))
