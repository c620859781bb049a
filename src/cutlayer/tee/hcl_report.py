"""Azure's HCL report: the hardware's report inside a confidential VM, and what it binds.

Azure's paravisor asks the hardware before the guest runs, binds the digest of a JSON ("runtime
claims": the vTPM's attestation key, the VM's configuration) and leaves both in the vTPM (NV index
0x01400001). It parses and compares the digest; the hardware's report is its own verifier's.

Source: Microsoft, "Guest attestation for confidential VMs", structure of the attestation report.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from cutlayer.tee.evidence import Platform
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.snp_report import REPORT_BYTES
from cutlayer.tee.untrusted import decode_base64url, decode_untrusted

__all__ = ["HclReport", "RuntimeClaims", "check_runtime_binding", "parse_hcl_report"]

_HEADER = struct.Struct("<4s3I16x")
_RUNTIME = struct.Struct("<5I")
_SIGNATURE = b"HCLA"
_HARDWARE_BYTES = REPORT_BYTES
_TD_REPORT_BYTES = 1024
_PLATFORMS = {2: Platform.SEV_SNP, 4: Platform.TDX}
_HASHES = {1: "sha256", 2: "sha384", 3: "sha512"}
_REPORT_DATA_OFFSETS = {Platform.SEV_SNP: 0x50, Platform.TDX: 0x80}
_REPORT_DATA_BYTES = 64
_MAX_BYTES = 64 << 10
_ATTESTATION_KEY = "HCLAkPub"
_RSA_BITS = range(2048, 4097)


class _Jwk(msgspec.Struct, frozen=True):
    kid: str
    kty: str
    n: str = ""
    e: str = ""


class RuntimeClaims(msgspec.Struct, frozen=True):
    """The JSON, as far as a verdict needs it."""

    keys: list[_Jwk]
    vm_configuration: dict[str, object] = msgspec.field(
        default_factory=dict, name="vm-configuration"
    )
    user_data: str = msgspec.field(default="", name="user-data")
    """Hex of 64 bytes that the guest set (NV index 0x01400002); older paravisors have none."""


_RUNTIME_CLAIMS = msgspec.json.Decoder(RuntimeClaims)


@dataclass(frozen=True, kw_only=True)
class HclReport:
    """Nobody has vouched for it yet."""

    platform: Platform
    """SEV_SNP or TDX."""
    hardware_report: bytes
    """SNP: the report. TDX: the TDREPORT, which no outsider can verify; a quote must come too."""
    report_data: bytes
    """64 bytes of the hardware's report."""
    hash_name: str
    runtime_json: bytes
    runtime: RuntimeClaims

    @property
    def user_data(self) -> bytes:
        """What the guest asked the paravisor to bind; empty where there is none.

        Raises:
            AttestationError: it is no hex.
        """
        try:
            return bytes.fromhex(self.runtime.user_data)
        except ValueError as error:
            raise refused(Refusal.MALFORMED, "the runtime claims' user-data is no hex") from error

    def attestation_key(self) -> rsa.RSAPublicKey:
        """The vTPM's attestation key.

        Raises:
            AttestationError: the claims hold none, or a weak one.
        """
        for key in self.runtime.keys:
            if key.kid == _ATTESTATION_KEY and key.kty == "RSA":
                return _rsa_key(key)
        raise refused(Refusal.MALFORMED, f"the runtime claims hold no RSA key {_ATTESTATION_KEY}")


def parse_hcl_report(data: bytes) -> HclReport:
    """A report as the vTPM keeps it.

    Args:
        data: contents of the NV index; zeros may follow.

    Raises:
        AttestationError: malformed, or of a VM without confidential hardware.
    """
    start = _HEADER.size + _HARDWARE_BYTES
    if len(data) > _MAX_BYTES or len(data) < start + _RUNTIME.size:
        raise refused(Refusal.MALFORMED, f"{len(data)} bytes are no HCL report")
    signature, *_ = _HEADER.unpack_from(data)
    if signature != _SIGNATURE:
        raise refused(Refusal.MALFORMED, "no HCL report: it does not begin with HCLA")
    _, _, report_type, hash_type, num_bytes = _RUNTIME.unpack_from(data, start)
    if report_type not in _PLATFORMS:
        raise refused(
            Refusal.OTHER_PLATFORM, f"HCL report of type {report_type}: neither SEV-SNP nor TDX"
        )
    if hash_type not in _HASHES:
        raise refused(Refusal.MALFORMED, f"HCL report with hash {hash_type}; known: 1, 2, 3")
    runtime_json = data[start + _RUNTIME.size :][:num_bytes]
    if len(runtime_json) != num_bytes:
        raise refused(Refusal.MALFORMED, "the HCL report's runtime claims are cut off")
    hardware = data[_HEADER.size : start]
    return _report(_PLATFORMS[report_type], hardware, _HASHES[hash_type], runtime_json)


def check_runtime_binding(report: HclReport, report_data: bytes) -> None:
    """Refuse runtime claims whose digest the hardware did not bind.

    Args:
        report: of the VM.
        report_data: 64 bytes of the hardware's report or quote.

    Raises:
        AttestationError: wrong-binding.
    """
    digest = hashlib.new(report.hash_name, report.runtime_json).digest()
    if not hmac.compare_digest(digest.ljust(_REPORT_DATA_BYTES, b"\0"), report_data):
        raise refused(
            Refusal.WRONG_BINDING,
            "the hardware's report binds other runtime claims than those beside it",
        )


def _report(platform: Platform, hardware: bytes, hash_name: str, runtime_json: bytes) -> HclReport:
    what = "the HCL report's runtime claims"
    runtime = decode_untrusted(_RUNTIME_CLAIMS.decode, runtime_json, what)
    offset = _REPORT_DATA_OFFSETS[platform]
    return HclReport(
        platform=platform,
        hardware_report=hardware if platform is Platform.SEV_SNP else hardware[:_TD_REPORT_BYTES],
        report_data=hardware[offset : offset + _REPORT_DATA_BYTES],
        hash_name=hash_name,
        runtime_json=runtime_json,
        runtime=runtime,
    )


def _rsa_key(key: _Jwk) -> rsa.RSAPublicKey:
    try:
        modulus, exponent = (int.from_bytes(decode_base64url(text)) for text in (key.n, key.e))
        if modulus.bit_length() not in _RSA_BITS:
            raise ValueError(f"{modulus.bit_length()} bits")
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except (ValueError, OverflowError) as error:
        raise refused(Refusal.MALFORMED, f"the vTPM's attestation key: {error}") from error
