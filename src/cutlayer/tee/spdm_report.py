"""An NVIDIA GPU's attestation report: SPDM 1.1 request and response, as the driver hands it out.

It parses and checks the signature under a given key; chains and reference values are
`verifiers.nvidia`.

Source: DMTF, DSP0274 1.1 (GET_MEASUREMENTS, MEASUREMENTS); NVIDIA, nvtrust, for the opaque fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cutlayer.tee.refusal import Refusal, refused

__all__ = ["SpdmReport", "check_report_signature", "parse_spdm_report"]

_VERSION = 0x11
_GET_MEASUREMENTS, _MEASUREMENTS = 0xE0, 0x60
_REQUEST_BYTES, _NONCE_BYTES, _SIGNATURE_BYTES = 37, 32, 96
_DMTF = 1
_DRIVER_VERSION, _VBIOS_VERSION, _NVDEC0_STATUS, _FWID, _PROTECTED_PCIE = 3, 6, 11, 20, 21
_ENABLED = 0xAA


@dataclass(frozen=True, kw_only=True)
class SpdmReport:
    """What the GPU signed; nothing is believed before `check_report_signature`."""

    nonce: bytes
    """Of the request: what the verifier asked the GPU to bind."""
    measurements: Mapping[int, str]
    """Hex by NVIDIA's zero-based index (an SPDM block's number less one)."""
    opaque: Mapping[int, bytes]
    """NVIDIA's fields by type."""
    signed: bytes
    signature: tuple[int, int]
    """r and s on P-384."""

    @property
    def driver_version(self) -> str:
        """As people write it: 550.144.03."""
        return self.opaque.get(_DRIVER_VERSION, b"").rstrip(b"\0").decode("ascii", "replace")

    @property
    def vbios(self) -> bytes:
        """Five bytes, most significant first."""
        raw = self.opaque.get(_VBIOS_VERSION, b"")
        return raw[3::-1] + raw[4:5]

    @property
    def vbios_version(self) -> str:
        """As people write it: 96.00.74.00.20."""
        return self.vbios.hex(".").upper()

    @property
    def fwid(self) -> bytes | None:
        """Digest of the firmware that the attestation key's certificate was made for."""
        return self.opaque.get(_FWID)

    @property
    def has_video_decoder(self) -> bool:
        """Measurement 35 is about it, and says nothing where it is off."""
        return self.opaque.get(_NVDEC0_STATUS) == bytes([_ENABLED])

    @property
    def is_pcie_protected(self) -> bool:
        """Several GPUs behind protected PCIe."""
        return self.opaque.get(_PROTECTED_PCIE) == bytes([_ENABLED])


def parse_spdm_report(data: bytes) -> SpdmReport:
    """Read request and response.

    Raises:
        AttestationError: malformed.
    """
    request, response = data[:_REQUEST_BYTES], data[_REQUEST_BYTES:]
    _check_header(request, _GET_MEASUREMENTS)
    _check_header(response, _MEASUREMENTS)
    num_blocks, records_bytes = response[4], int.from_bytes(response[5:8], "little")
    records, rest = response[8 : 8 + records_bytes], response[8 + records_bytes :]
    opaque_bytes = int.from_bytes(rest[_NONCE_BYTES : _NONCE_BYTES + 2], "little")
    opaque = rest[_NONCE_BYTES + 2 : _NONCE_BYTES + 2 + opaque_bytes]
    if len(rest) != _NONCE_BYTES + 2 + opaque_bytes + _SIGNATURE_BYTES:
        raise refused(Refusal.MALFORMED, f"a GPU's report of {len(data)} bytes ends elsewhere")
    r, s = data[-_SIGNATURE_BYTES : -_SIGNATURE_BYTES // 2], data[-_SIGNATURE_BYTES // 2 :]
    return SpdmReport(
        nonce=request[4 : 4 + _NONCE_BYTES],
        measurements=_read_measurements(records, num_blocks),
        opaque=_read_opaque(opaque),
        signed=data[:-_SIGNATURE_BYTES],
        signature=(int.from_bytes(r, "big"), int.from_bytes(s, "big")),
    )


def _check_header(message: bytes, code: int) -> None:
    if len(message) < 8 or message[0] != _VERSION or message[1] != code:
        raise refused(Refusal.MALFORMED, "this is no attestation report of an NVIDIA GPU")


def _read_measurements(records: bytes, num_blocks: int) -> dict[int, str]:
    found: dict[int, str] = {}
    while records:
        index, kind = records[0], records[1:2]
        size = int.from_bytes(records[2:4], "little")
        block, records = records[4 : 4 + size], records[4 + size :]
        # A DMTF measurement: type of value, its size, the value.
        value = block[3:]
        is_whole = len(block) == size and len(value) == int.from_bytes(block[1:3], "little")
        if kind != bytes([_DMTF]) or not index or not value or not is_whole or index - 1 in found:
            raise refused(Refusal.MALFORMED, f"measurement block {index} of a GPU's report")
        found[index - 1] = value.hex()
    if len(found) != num_blocks:
        raise refused(Refusal.MALFORMED, f"{len(found)} measurements, {num_blocks} are announced")
    return found


def _read_opaque(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while data:
        head, kind = data[:4], int.from_bytes(data[:2], "little")
        size = int.from_bytes(head[2:], "little")
        value, data = data[4 : 4 + size], data[4 + size :]
        if len(head) + len(value) != 4 + size or kind in found:
            raise refused(Refusal.MALFORMED, f"field {kind} of a GPU's report")
        found[kind] = value
    return found


def check_report_signature(report: SpdmReport, key: ec.EllipticCurvePublicKey) -> None:
    """Refuse a report that the key did not sign.

    Raises:
        AttestationError: bad-signature.
    """
    try:
        signature = encode_dss_signature(*report.signature)
        key.verify(signature, report.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise refused(Refusal.BAD_SIGNATURE, "the GPU's key did not sign this report") from None
