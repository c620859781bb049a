"""Intel TDX: the quote of a confidential VM. Collateral: `intel` (dcap-qvl's JSON).

Signature and TCB logic is `cutlayer.tee.quote`'s, shared with SGX.
"""

from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import verify_quote
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["TdxVerifier"]


@VERIFIERS.register(Platform.TDX)
class TdxVerifier:
    """Quotes of version 4 and 5 up to Intel's root."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """Claims of a TD quote."""
        return verify_quote(evidence, trust, Platform.TDX)
