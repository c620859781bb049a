"""Which roots a verdict rests on: the vendor's, or those that the policy named instead.

It checks no chain (`certificate_chain`).
"""

from collections.abc import Collection
from dataclasses import dataclass

from cutlayer.tee.assurance import Assurance
from cutlayer.tee.certificate_chain import root_fingerprints
from cutlayer.tee.evidence import Platform
from cutlayer.tee.verifier import Trust

__all__ = ["BelievedRoots", "believed_roots"]


@dataclass(frozen=True, kw_only=True)
class BelievedRoots:
    """Roots, and what they can vouch for."""

    fingerprints: frozenset[str]
    """SHA-256 of each root's DER, lower-case hex."""
    assurance: Assurance


def believed_roots(
    trust: Trust, platform: Platform, vendor_fingerprints: Collection[str]
) -> BelievedRoots:
    """The vendor's roots for hardware; those of the policy, if it names any, for SIMULATED.

    Args:
        trust: of the verdict.
        platform: whose roots.
        vendor_fingerprints: the built-in ones.

    Raises:
        AttestationError: the policy's root is no certificate.
    """
    if platform not in trust.roots:
        return BelievedRoots(
            fingerprints=frozenset(vendor_fingerprints), assurance=Assurance.HARDWARE_TEE
        )
    named = root_fingerprints(trust.roots[platform])
    return BelievedRoots(fingerprints=named, assurance=Assurance.SIMULATED)
