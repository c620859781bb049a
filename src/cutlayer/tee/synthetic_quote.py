"""Bytes of a TDX quote of version 4, as hardware lays them out.

It signs nothing and knows no key (`synthetic_quoter`).
Source: Intel TDX DCAP Quoting Library API, appendix 3 (quote format, version 4).
"""

import struct
from dataclasses import dataclass

__all__ = [
    "QE_AUTH_DATA",
    "QE_MR_SIGNER",
    "TCB_SVN",
    "TdFields",
    "auth_data",
    "qe_report",
    "signed_part",
]

TCB_SVN = bytes([3] * 16)
"""Component versions of the simulated platform, CPU and TDX module alike."""

QE_MR_SIGNER = bytes.fromhex("c07a") * 16
"""Of the simulated quoting enclave; its identity file names the same."""

QE_AUTH_DATA = bytes(range(32))
"""Hashed with the attestation key; hardware puts the same constant."""

# Verifiers take no other vendor of the quoting enclave.
_INTEL_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_ECDSA_P256, _TEE_TDX = 2, 0x81
_QE_REPORT_CERTIFICATION, _PCK_CHAIN = 6, 5
_SEPT_VE_DISABLE, _DEBUG = 1 << 28, 1
_QE_ATTRIBUTES = bytes.fromhex("1100000000000000e700000000000000")
_NO_MEASUREMENT = bytes(48)


@dataclass(frozen=True, kw_only=True)
class TdFields:
    """What the simulated TDX module reports of a TD."""

    mr_td: bytes
    """48 bytes."""
    report_data: bytes
    """64 bytes."""
    rtmrs: tuple[bytes, bytes, bytes, bytes] = (_NO_MEASUREMENT,) * 4
    """48 bytes each."""
    is_debug: bool = False


def signed_part(fields: TdFields) -> bytes:
    """Header and TD report: what the attestation key signs; 632 bytes."""
    user_data = b"cutlayer simulated".ljust(20, b"\0")
    header = struct.pack("<HHIHH", 4, _ECDSA_P256, _TEE_TDX, 0, 0) + _INTEL_QE_VENDOR + user_data
    attributes = _SEPT_VE_DISABLE | (_DEBUG if fields.is_debug else 0)
    # mr_seam, mr_signer_seam and seam_attributes of an Intel module are zeros but the first.
    module = _NO_MEASUREMENT + _NO_MEASUREMENT + bytes(8)
    configuration = _NO_MEASUREMENT * 3
    report = (
        TCB_SVN
        + module
        + struct.pack("<QQ", attributes, 0x0000_0000_0006_02E7)
        + fields.mr_td
        + configuration
        + b"".join(fields.rtmrs)
        + fields.report_data
    )
    return header + report


def qe_report(report_data: bytes) -> bytes:
    """The simulated quoting enclave's own report; 384 bytes.

    Args:
        report_data: 32 bytes, a hash over the attestation key.
    """
    return (
        TCB_SVN
        + bytes(4 + 28)
        + _QE_ATTRIBUTES
        + bytes(32)
        + bytes(32)
        + QE_MR_SIGNER
        + bytes(96)
        + struct.pack("<HH", 2, 5)
        + bytes(60)
        + report_data.ljust(64, b"\0")
    )


def auth_data(
    signature: bytes, key: bytes, report: bytes, report_signature: bytes, chain_pem: bytes
) -> bytes:
    """What follows the signed part: length, signature, key, certification.

    Args:
        signature: of the signed part, r and s of 32 bytes.
        key: the attestation key, x and y of 32 bytes.
        report: of the quoting enclave.
        report_signature: of it, by the platform's certified key.
        chain_pem: certificates of that key.
    """
    chain = struct.pack("<HI", _PCK_CHAIN, len(chain_pem)) + chain_pem
    certified = report + report_signature + struct.pack("<H", 32) + QE_AUTH_DATA + chain
    certification = struct.pack("<HI", _QE_REPORT_CERTIFICATION, len(certified)) + certified
    body = signature + key + certification
    return struct.pack("<I", len(body)) + body
