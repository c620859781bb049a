"""TPM 2.0: a quote over PCRs by an attestation key that is certified, or was activated before.

Body: TPMS_ATTEST. Collateral: `signature` (TPMT_SIGNATURE), `ak` (the key's public area,
TPM2B_PUBLIC), `pcrs` (the values one after another, in the order of the quote's selection), and,
unless the policy's file `roots.tpm` holds the key itself, `ak_certificate` (PEM, the key's
certificate first, the root last) with an optional `crl`.

It says what was booted, not that memory is hidden from the host: measured-boot. The event log is
not read: policies pin PCR values.
"""

from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.tpm_attest import (
    HASHES,
    Quote,
    parse_quote,
    parse_signature,
    pcr_measurements,
    verify_quote,
)
from cutlayer.tee.tpm_keys import TpmPublic, key_digest, parse_public
from cutlayer.tee.tpm_trust import ATTESTATION_USAGE, check_key_certificate, pinned_keys
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["TpmVerifier"]


@VERIFIERS.register(Platform.TPM)
class TpmVerifier:
    """Quotes by RSA and EC keys over SHA-2 banks."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """What the quote says.

        Raises:
            AttestationError: see `Verifier`.
        """
        ak = parse_public(_part(evidence, "ak"))
        signature = parse_signature(_part(evidence, "signature"))
        pcrs = _split_values(parse_quote(evidence.body), _part(evidence, "pcrs"))
        trusted_by = _check_key(ak, evidence, trust)
        quote = verify_quote(evidence.body, signature, ak.key, pcrs)
        return Claims(
            platform=Platform.TPM,
            assurance=Assurance.MEASURED_BOOT,
            measurements=_key_measurements(ak, quote) | pcr_measurements(quote, pcrs),
            report_data=quote.nonce,
            is_debug=False,
            tcb_status="UpToDate",
            chip=key_digest(ak.key),
            details=_details(quote, trusted_by),
        )


def _part(evidence: Evidence, name: str) -> bytes:
    if name not in evidence.collateral:
        raise refused(Refusal.NO_COLLATERAL, f"a TPM's quote comes with {name!r}; it is missing")
    return evidence.collateral[name]


def _split_values(quote: Quote, values: bytes) -> dict[str, dict[int, bytes]]:
    """Values by bank and index; the quote is not believed yet."""
    found: dict[str, dict[int, bytes]] = {}
    start = 0
    for bank, indices in quote.selections:
        size = HASHES[bank]().digest_size
        for index in indices:
            found.setdefault(bank, {})[index] = values[start : start + size]
            start += size
    if start != len(values):
        raise refused(
            Refusal.MALFORMED, f"the selected PCRs take {start} bytes, {len(values)} came"
        )
    return found


def _check_key(ak: TpmPublic, evidence: Evidence, trust: Trust) -> str:
    """Who vouches for the attestation key, for people."""
    if not ak.is_attestation_key:
        raise refused(
            Refusal.BAD_SIGNATURE, "the key may sign anything, or can leave its TPM: no quote of it"
        )
    roots = trust.roots.get(Platform.TPM, b"")
    if key_digest(ak.key) in pinned_keys(roots):
        return "the policy: an activated key"
    if "ak_certificate" not in evidence.collateral:
        raise refused(
            Refusal.WRONG_ROOT,
            f"attestation key {key_digest(ak.key)} has no certificate and is not among the "
            "activated keys of the policy's `roots.tpm`",
        )
    leaf = check_key_certificate(
        ak.key,
        evidence.collateral["ak_certificate"],
        roots,
        trust.at,
        ATTESTATION_USAGE,
        evidence.collateral.get("crl"),
    )
    return f"a certificate by {leaf.issuer.rfc4514_string()}"


def _key_measurements(ak: TpmPublic, quote: Quote) -> dict[str, str]:
    return {
        "ak_sha256": key_digest(ak.key),
        "firmware_version": quote.firmware_version.to_bytes(8, "big").hex(),
    }


def _details(quote: Quote, trusted_by: str) -> dict[str, str]:
    return {
        "trusted_by": trusted_by,
        "powered_ms": str(quote.clock_ms),
        "clock_is_safe": str(quote.is_clock_safe),
        "resets": str(quote.reset_count),
        "restarts": str(quote.restart_count),
    }
