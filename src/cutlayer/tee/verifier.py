"""From evidence to claims: the registry of verifiers, one class per platform.

A new platform is a class under `@VERIFIERS.register` in `tee/verifiers/`; the conformance suite
`tests/unit/tee/test_verifiers.py` runs over all of them. Whether claims suffice is the policy's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from cutlayer.registry import Registry
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform

__all__ = ["VERIFIERS", "Trust", "Verifier", "utc_now"]


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whom a verifier believes, and when."""

    at: datetime
    """Time of the verdict, UTC with time zone: dates are checked against this alone."""
    roots: Mapping[Platform, bytes] = field(default_factory=dict)
    """PEM roots that replace the vendor's built-in one. Whatever a replaced root vouches for is
    `Assurance.SIMULATED`, on every platform but TPM, whose maker's root is always named here."""


class Verifier(Protocol):
    """Checks signatures, chain, revocation and dates of one platform's evidence. Offline."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """What it says.

        Raises:
            AttestationError: with `refusal`; nothing else ever, whatever the bytes are.
        """


VERIFIERS: Registry[Verifier] = Registry("evidence platform")
"""By `Platform` value."""


def utc_now() -> datetime:
    """The verdict's time where the caller names none."""
    return datetime.now(UTC)
