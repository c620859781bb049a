"""An Azure confidential VM of the tests' own: paravisor on a SEV-SNP chip, vTPM with its key."""

import base64
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from cutlayer.tee.evidence import Evidence, Platform
from tests.unit.tee.authorities import rsa_key
from tests.unit.tee.snp_worlds import SnpChip, Wished, make_chip

PCR4 = b"\x44" * 32
_SHA256, _RSASSA = 0x000B, 0x0014
# fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign
_ATTRIBUTES = 0x00050072


@dataclass(frozen=True, kw_only=True)
class AzureVm:
    """Chip, paravisor and vTPM."""

    chip: SnpChip = field(default_factory=make_chip)
    key: rsa.RSAPrivateKey = field(default_factory=rsa_key)

    def runtime(self, user_data: bytes = b"", key: rsa.RSAPublicKey | None = None) -> bytes:
        """The JSON that the hardware binds; `key` stands in for the VM's own."""
        numbers = (key or self.key.public_key()).public_numbers()
        named = {
            "kid": "HCLAkPub",
            "key_ops": ["sign"],
            "kty": "RSA",
            "e": _base64(numbers.e.to_bytes(3)),
            "n": _base64(numbers.n.to_bytes(256)),
        }
        claims: dict[str, object] = {"keys": [named], "vm-configuration": {"secure-boot": True}}
        if user_data:
            claims["user-data"] = user_data.hex().upper()
        return json.dumps(claims).encode()

    def report(self, runtime: bytes, hardware: bytes | None = None, report_type: int = 2) -> bytes:
        """The HCL report over that JSON."""
        bound = hashlib.sha256(runtime).digest()
        hardware = hardware or self.chip.report(Wished(report_data=bound))
        size = 32 + 1184 + 20 + len(runtime)
        header = struct.pack("<4s3I16x", b"HCLA", 2, size, 2)
        claims = struct.pack("<5I", 20 + len(runtime), 1, report_type, 1, len(runtime)) + runtime
        return header + hardware.ljust(1184, b"\0") + claims + bytes(64)

    def quote(self, nonce: bytes, pcr4: bytes = PCR4) -> dict[str, bytes]:
        """Collateral of a vTPM quote over PCR 4."""
        attest = b"\xffTCG" + struct.pack(">H", 0x8018) + _sized(b"\0" * 34) + _sized(nonce)
        attest += struct.pack(">QIIBQ", 1000, 1, 0, 1, 0x20200312)
        attest += struct.pack(">IHB", 1, _SHA256, 3) + bytes([1 << 4, 0, 0])
        attest += _sized(hashlib.sha256(pcr4).digest())
        value = self.key.sign(attest, padding.PKCS1v15(), hashes.SHA256())
        signature = struct.pack(">HH", _RSASSA, _SHA256) + _sized(value)
        return {"quote": attest, "signature": signature, "ak": self.public_area(), "pcrs": pcr4}

    def public_area(self) -> bytes:
        """TPM2B_PUBLIC of the attestation key."""
        modulus = self.key.public_key().public_numbers().n.to_bytes(256)
        area = struct.pack(">HHIH", 0x0001, _SHA256, _ATTRIBUTES, 0)
        area += struct.pack(">HHHHI", 0x0010, _RSASSA, _SHA256, 2048, 0) + _sized(modulus)
        return _sized(area)

    def evidence(self, nonce: bytes = b"", extra: Mapping[str, bytes] | None = None) -> Evidence:
        """With a quote where there is a nonce."""
        collateral = self.chip.collateral | (self.quote(nonce) if nonce else {})
        return Evidence(
            platform=Platform.AZURE,
            body=self.report(self.runtime()),
            collateral=collateral | dict(extra or {}),
        )


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
