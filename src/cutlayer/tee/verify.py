"""The one way from evidence to a result: verify each piece, join them, ask the policy.

It opens no connection: everything that a verdict needs comes with the evidence or the policy.
"""

from dataclasses import dataclass, replace
from datetime import datetime

import cutlayer.tee.verifiers  # noqa: F401  (registers them)
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.policy import Policy, appraise
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["AttestationResult", "claims_of", "verify"]


@dataclass(frozen=True, kw_only=True)
class AttestationResult:
    """What is printed, logged and kept: the evidence passed this policy at this time."""

    claims: Claims
    policy: str
    """Its name."""
    policy_digest: str
    at: datetime

    @property
    def assurance(self) -> Assurance:
        """Of the claims; never more than the weakest piece allows."""
        return self.claims.assurance


def verify(
    evidence: Evidence, policy: Policy, at: datetime, report_data: bytes | None
) -> AttestationResult:
    """Judge evidence.

    Args:
        evidence: the peer's.
        policy: the owner's.
        at: time of the verdict, UTC with time zone.
        report_data: what it must bind (`Binding.report_data`); None for a file alone.

    Raises:
        AttestationError: refused; `refusal` names the reason.
        ConfigError: a root of the policy cannot be read.
    """
    if evidence.platform not in policy.platforms:
        # Before its parser sees a byte: what is not wanted is not looked at.
        wanted = ", ".join(policy.platforms)
        raise refused(Refusal.OTHER_PLATFORM, f"{evidence.platform}; the policy wants {wanted}")
    roots = policy.read_roots()
    claims = claims_of(evidence, Trust(at=at, roots=roots))
    appraise(claims, policy, at, report_data)
    digest = policy.digest_with(roots)
    return AttestationResult(claims=claims, policy=policy.name, policy_digest=digest, at=at)


def claims_of(evidence: Evidence, trust: Trust) -> Claims:
    """Verified claims of evidence and of its accelerators; the policy has not been asked.

    Raises:
        AttestationError: a signature, chain, date or format does not hold.
    """
    if evidence.platform not in VERIFIERS:
        raise refused(Refusal.OTHER_PLATFORM, f"no verifier is known for {evidence.platform}")
    if evidence.platform is Platform.NVIDIA and evidence.companions:
        raise refused(Refusal.MALFORMED, "an accelerator's evidence has evidence of its own")
    claims = _alone(VERIFIERS.get(evidence.platform).verify(evidence, trust))
    companions = tuple(one for piece in evidence.companions for one in _companion(piece, trust))
    if not companions:
        return claims
    # A simulated accelerator makes the whole simulated; a real one lifts real hardware alone.
    joint = min(claims.assurance, *(one.assurance for one in companions))
    is_whole = claims.assurance >= Assurance.HARDWARE_TEE and joint >= Assurance.HARDWARE_TEE
    level = Assurance.HARDWARE_TEE_GPU if is_whole else joint
    return replace(claims, companions=companions, assurance=level)


def _alone(claims: Claims) -> Claims:
    """A GPU answers whoever asks: without a CPU's evidence nothing says for which program."""
    if claims.platform is not Platform.NVIDIA:
        return claims
    level = min(claims.assurance, Assurance.MEASURED_BOOT)
    companions = tuple(replace(one, assurance=level) for one in claims.companions)
    return replace(claims, assurance=level, companions=companions)


def _companion(piece: Evidence, trust: Trust) -> list[Claims]:
    """One claim per accelerator: a service's token can be about several."""
    if piece.platform is not Platform.NVIDIA:
        raise refused(Refusal.OTHER_PLATFORM, f"{piece.platform} evidence beside a CPU's")
    if piece.companions:
        raise refused(Refusal.MALFORMED, "an accelerator's evidence has evidence of its own")
    claims = VERIFIERS.get(piece.platform).verify(piece, trust)
    return [replace(claims, companions=()), *claims.companions]
