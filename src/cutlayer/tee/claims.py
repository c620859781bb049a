"""What verified evidence says, in one form for all platforms. It judges nothing (`policy`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from cutlayer.tee.assurance import Assurance
from cutlayer.tee.evidence import Platform

__all__ = ["Claims"]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Signatures, chain and dates hold; whether that is enough is the policy's."""

    platform: Platform
    assurance: Assurance
    measurements: Mapping[str, str]
    """Lower-case hex by the platform's own names (`mr_td`, `rtmr0`, `mr_enclave`, `measurement`,
    `pcr4` ...); every value that a policy may pin is here."""
    report_data: bytes
    """What the attester was asked to bind: 64 bytes on TDX, SGX and SNP (a 32-byte digest is
    followed by zeros), the nonce of a TPM quote or a GPU report, Nitro's user_data."""
    is_debug: bool
    tcb_status: str
    """The vendor's word, "UpToDate" where the vendor has none and the firmware was checked."""
    advisories: tuple[str, ...] = ()
    tcb_evaluation: int | None = None
    """Number of the vendor's evaluation that this status is from (Intel's alone has one)."""
    chip: str | None = None
    """Identifier of the physical part, where the evidence has one."""
    issued_at: datetime | None = None
    """UTC; where the evidence carries a time."""
    details: Mapping[str, str] = field(default_factory=dict)
    """For people: versions, models, driver."""
    companions: tuple["Claims", ...] = ()
    """Of accelerators."""
