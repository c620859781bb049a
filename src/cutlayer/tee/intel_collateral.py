"""Fetch what verifies an Intel quote from Intel's service or a cache of it (PCCS).

The one thing of this room that opens a connection, on command alone; a verdict never does. What
comes is signed by Intel and believed only for that, so the way there needs no trust.
"""

import asyncio

from cutlayer.errors import TransportError
from cutlayer.tee.quote import dcap_package, parse_quote

__all__ = ["INTEL_SERVICE", "fetch_collateral"]

INTEL_SERVICE = "https://api.trustedservices.intel.com"
"""Intel's Provisioning Certification Service."""

_TIMEOUT_S = 60.0


def fetch_collateral(body: bytes, url: str = INTEL_SERVICE) -> bytes:
    """QuoteCollateralV3 as JSON, good for about 30 days.

    Args:
        body: a TDX or SGX quote of the machine.
        url: base address of the service or cache.

    Raises:
        AttestationError: these bytes are no quote.
        TransportError: the service did not answer, or not with collateral.
    """
    parse_quote(body)
    try:
        return asyncio.run(_fetch(body, url)).encode()
    except (ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error) or f"no answer in {_TIMEOUT_S:g} s"
        raise TransportError(f"no collateral from {url}: {reason}") from error


async def _fetch(body: bytes, url: str) -> str:
    found = await asyncio.wait_for(dcap_package().get_collateral(url, body), _TIMEOUT_S)
    return str(found.to_json())
