"""The forms in which NVIDIA's tools write a GPU's evidence, told apart by their first characters.

Bytes, hex text, or the JSON of several GPUs with their chains. It verifies nothing.
"""

from dataclasses import dataclass

import msgspec

from cutlayer.tee.evidence import Evidence
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.untrusted import decode_untrusted

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
    evidence: bytes
    certificate: bytes


_ENTRIES = msgspec.json.Decoder(list[_Entry])


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
    entries = decode_untrusted(_ENTRIES.decode, body, "the JSON of GPUs' reports")
    if not 0 < len(entries) <= _MAX_GPUS:
        raise refused(Refusal.MALFORMED, f"the most is {_MAX_GPUS} GPUs' reports")
    return [GpuReport(report=entry.evidence, chain=entry.certificate) for entry in entries]
