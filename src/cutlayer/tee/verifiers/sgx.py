"""Intel SGX: the quote of an enclave. Collateral: `intel` (dcap-qvl's JSON).

Signature and TCB logic is `cutlayer.tee.quote`'s, shared with TDX.
"""

from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import verify_quote
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["SgxVerifier"]


@VERIFIERS.register(Platform.SGX)
class SgxVerifier:
    """Quotes of version 3 up to Intel's root."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """Claims of an enclave's quote."""
        return verify_quote(evidence, trust, Platform.SGX)
