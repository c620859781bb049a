"""Simulated evidence: a real TDX quote by software, under a test root that the policy names.

The path is TDX's, byte for byte; only the root differs, so the claims are SIMULATED always.
"""

from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import verify_quote
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["SimulatedVerifier"]


@VERIFIERS.register(Platform.SIMULATED)
class SimulatedVerifier:
    """Quotes of `synthetic_quoter`; without a named root there is nothing to believe."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """Claims of a simulated TD quote.

        Raises:
            AttestationError: as of TDX; wrong-root where no root is named.
        """
        if Platform.SIMULATED not in trust.roots:
            raise refused(
                Refusal.WRONG_ROOT,
                "simulated evidence has no vendor; name its test root as roots.simulated",
            )
        return verify_quote(evidence, trust, Platform.TDX)
