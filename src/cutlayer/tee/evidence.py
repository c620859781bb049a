"""Evidence as it is stored and sent: platform, the vendor's bytes, what verifies them offline.

It is not parsed here (`verifiers`) and not judged (`policy`). As a file it is JSON with base64.
"""

from enum import StrEnum
from pathlib import Path

import msgspec

from cutlayer.errors import AttestationError, ConfigError
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.untrusted import decode_untrusted

__all__ = [
    "MAX_EVIDENCE_BYTES",
    "Evidence",
    "Platform",
    "decode_evidence",
    "read_evidence",
    "read_limited",
]

MAX_EVIDENCE_BYTES = 4 << 20
"""Evidence of eight GPUs with chains is below one MiB."""


class Platform(StrEnum):
    """What made it."""

    TDX = "tdx"
    SGX = "sgx"
    SEV_SNP = "sev-snp"
    NVIDIA = "nvidia"
    NITRO = "nitro"
    TPM = "tpm"
    AZURE = "azure"
    SIMULATED = "simulated"
    """A TDX quote by software, under a test root that the policy must name."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an attester made."""

    platform: Platform
    body: bytes
    """The vendor's format: quote, report, document."""
    collateral: dict[str, bytes] = {}
    """By the verifier's names (its docstring lists them): chains, revocation lists, logs."""
    companions: list["Evidence"] = []
    """Of accelerators beside the CPU, bound to the same report data."""

    def to_json(self) -> bytes:
        """The file's form."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


_DECODER = msgspec.json.Decoder(Evidence)


def decode_evidence(data: bytes) -> Evidence:
    """Evidence from a peer or a file.

    Raises:
        AttestationError: malformed, or larger than any evidence.
    """
    if len(data) > MAX_EVIDENCE_BYTES:
        raise refused(Refusal.MALFORMED, "evidence of more than 4 MiB, which none has")
    return decode_untrusted(_DECODER.decode, data, "this is no evidence file")


def read_evidence(path: Path) -> Evidence:
    """Evidence from a file.

    Raises:
        ConfigError: the file cannot be read.
        AttestationError: malformed; the message names the file.
    """
    data = _read(path, "evidence")
    try:
        return decode_evidence(data)
    except AttestationError as error:
        raise refused(Refusal.MALFORMED, f"{path}: {error}") from error


def read_limited(path: Path, what: str) -> bytes:
    """A file that is, or goes with, evidence in a vendor's form.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        ConfigError: it cannot be read, or is larger than any evidence.
    """
    data = _read(path, what)
    if len(data) > MAX_EVIDENCE_BYTES:
        raise ConfigError(
            f"{what} {path} is larger than any evidence ({MAX_EVIDENCE_BYTES} bytes); name another"
        )
    return data


def _read(path: Path, what: str) -> bytes:
    """The file, or one byte more of it than evidence may have."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_EVIDENCE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
