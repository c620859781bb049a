"""The forms in which NVIDIA's tools write a GPU's evidence, told apart by their first characters.

Bytes, hex text, or the JSON of several GPUs with their chains. It verifies nothing.
"""

import base64
import binascii
from dataclasses import dataclass

import msgspec

from cutlayer.tee.evidence import Evidence
from cutlayer.tee.refusal import Refusal, refused

__all__ = ["GpuReport", "is_token_bundle", "read_reports"]

_MAX_GPUS = 64
_HEAD_BYTES = 64
_SPACE = b" \t\r\n"


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """One GPU's, not verified."""

    report: bytes
    chain: bytes
    """PEM."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    # Also there: the architecture and the nonce, both of which the report states itself.
    evidence: str
    certificate: str


def _head(body: bytes) -> bytes:
    return body[:_HEAD_BYTES].translate(None, _SPACE)


def is_token_bundle(body: bytes) -> bool:
    """Whether this is an answer of NVIDIA's attestation service."""
    return _head(body).startswith(b"[[")


def read_reports(evidence: Evidence) -> list[GpuReport]:
    """The reports in a body, at least one.

    Raises:
        AttestationError: malformed, or a report without its chain.
    """
    if _head(evidence.body).startswith(b"[{"):
        return _read_collection(evidence.body)
    if "chain" not in evidence.collateral:
        raise refused(Refusal.NO_COLLATERAL, "a GPU's report comes with its 'chain'")
    return [GpuReport(report=_bytes_of(evidence.body), chain=evidence.collateral["chain"])]


def _bytes_of(body: bytes) -> bytes:
    if not _head(body).lower().startswith(b"11e0"):
        return body
    try:
        return bytes.fromhex(body.decode("ascii"))
    except ValueError as error:
        raise refused(Refusal.MALFORMED, f"a GPU's report in hex: {error}") from error


def _read_collection(body: bytes) -> list[GpuReport]:
    try:
        entries = msgspec.json.decode(body, type=list[_Entry])
        found = [
            GpuReport(report=_decode(entry.evidence), chain=_decode(entry.certificate))
            for entry in entries[: _MAX_GPUS + 1]
        ]
    except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, ValueError) as error:
        raise refused(Refusal.MALFORMED, f"the JSON of GPUs' reports: {error}") from error
    if not 0 < len(found) <= _MAX_GPUS:
        raise refused(Refusal.MALFORMED, f"the most is {_MAX_GPUS} GPUs' reports")
    return found


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
