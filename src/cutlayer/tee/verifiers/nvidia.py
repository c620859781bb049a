"""NVIDIA GPUs in confidential mode: the GPU's own report, or its service's tokens.

Report: body is the SPDM request and response as bytes or hex text, with collateral `chain` (PEM,
the GPU's certificate first, NVIDIA's root last); or the JSON of several GPUs with their chains, as
NVIDIA's tools write it. Optional: `crl`, and NVIDIA's manifests `rim` (driver) and `vbios_rim`.
Only with both is `tcb_status` "UpToDate"; otherwise it says what nobody compared, and the policy
pins measurements instead. The report has no debug flag: debug firmware measures differently.

Tokens: body is the service's JSON, collateral `jwks` its key set of the day. In either form, more
GPUs than one become companions of the first. No revocation service is asked, nothing is fetched.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cutlayer.tee.assurance import Assurance
from cutlayer.tee.believed_roots import BelievedRoots, believed_roots
from cutlayer.tee.certificate_chain import (
    check_chain,
    issuer_key,
    load_certificates,
    load_revocation_list,
)
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.nvidia_forms import GpuReport, is_token_bundle, read_reports
from cutlayer.tee.nvidia_token import GpuToken, verify_tokens
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.rim import compare, verify_rim
from cutlayer.tee.spdm_report import SpdmReport, check_report_signature, parse_spdm_report
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["NVIDIA_ROOTS", "NvidiaVerifier"]

NVIDIA_ROOTS = {
    "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48": "Device Identity CA",
    "12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1": "CoRIM signing Root CA",
}
"""NVIDIA's root certificates by SHA-256 of their DER: for GPUs, and for manifests."""

_DEVICE_ROOT, _MANIFEST_ROOT = (frozenset([root]) for root in NVIDIA_ROOTS)
_FIRMWARE_OIDS = ("2.23.133.5.4.1", "2.23.133.5.4.1.1")
_SHA384_DIGEST = bytes.fromhex("06096086480165030402020430")
_DECODER_MEASUREMENT = 35
# The same authority certifies switches and network cards, which keep no tenant's data.
_GPU_MODEL = re.compile(r"CN=G[A-Z]\d{3} ")


@VERIFIERS.register(Platform.NVIDIA)
class NvidiaVerifier:
    """Hopper and Blackwell."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """What the report or the tokens say.

        Raises:
            AttestationError: see `Verifier`.
        """
        if is_token_bundle(evidence.body):
            return _verify_tokens(evidence, trust)
        gpus = read_reports(evidence)
        first, *others = [_verify_report(gpu, evidence.collateral, trust) for gpu in gpus]
        return replace(first, companions=tuple(others))


def _verify_report(gpu: GpuReport, collateral: Mapping[str, bytes], trust: Trust) -> Claims:
    report = parse_spdm_report(gpu.report)
    roots = believed_roots(trust, Platform.NVIDIA, _DEVICE_ROOT)
    chain = _check_device(gpu.chain, collateral.get("crl"), report, roots, trust.at)
    return Claims(
        platform=Platform.NVIDIA,
        assurance=roots.assurance,
        measurements=_measurements(report),
        report_data=report.nonce,
        is_debug=False,
        tcb_status=_compare_manifests(collateral, report, trust),
        chip=f"{chain[1].serial_number:x}" if len(chain) > 1 else None,
        details={
            "driver": report.driver_version,
            "vbios": report.vbios_version,
            "model": chain[0].subject.rfc4514_string(),
            "ueid": str(chain[0].serial_number),
            "protected_pcie": str(report.is_pcie_protected),
        },
    )


def _check_device(
    pem: bytes,
    revocation_list: bytes | None,
    report: SpdmReport,
    roots: BelievedRoots,
    at: datetime,
) -> list[x509.Certificate]:
    chain = load_certificates(pem, "the GPU's chain")
    revoked = [] if revocation_list is None else [load_revocation_list(revocation_list, "crl")]
    check_chain(
        chain, at=at, roots=roots.fingerprints, what="the GPU's chain", revocation_lists=revoked
    )
    model = chain[0].subject.rfc4514_string()
    if not _GPU_MODEL.match(model):
        raise refused(Refusal.OTHER_PLATFORM, f"{model} is no GPU that is known here")
    key = issuer_key(chain[0])
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise refused(Refusal.BAD_SIGNATURE, "the GPU's key is not an elliptic curve's")
    check_report_signature(report, key)
    if report.fwid is not None and not _is_certified_for(chain[0], report.fwid):
        raise refused(Refusal.BAD_CHAIN, "the GPU's certificate is for other firmware than it runs")
    return chain


def _is_certified_for(certificate: x509.Certificate, fwid: bytes) -> bool:
    """Whether the certificate's DICE extension names this firmware (SHA-384)."""
    values = [
        extension.value.value
        for extension in certificate.extensions
        if extension.oid.dotted_string in _FIRMWARE_OIDS
        and isinstance(extension.value, x509.UnrecognizedExtension)
    ]
    return any(_SHA384_DIGEST + fwid in value for value in values)


def _compare_manifests(found: Mapping[str, bytes], report: SpdmReport, trust: Trust) -> str:
    """Refuse a mismatch; say what was compared."""
    roots = believed_roots(trust, Platform.NVIDIA, _MANIFEST_ROOT).fingerprints
    has_driver, has_vbios = "rim" in found, "vbios_rim" in found
    if has_driver:
        _compare(found["rim"], report, report.driver_version, roots, trust.at)
    if has_vbios:
        _compare(found["vbios_rim"], report, report.vbios_version, roots, trust.at)
    if has_driver and has_vbios:
        return "UpToDate"
    return "VbiosNotCompared" if has_driver else "NotCompared"


def _compare(
    manifest: bytes, report: SpdmReport, version: str, roots: Collection[str], at: datetime
) -> None:
    rim = verify_rim(manifest, roots, at)
    ignored = () if report.has_video_decoder else (_DECODER_MEASUREMENT,)
    compare(rim, report.measurements, ignored)
    if rim.version.upper() != version.upper():
        raise refused(
            Refusal.WRONG_MEASUREMENT,
            f"the GPU runs {version}, the manifest is for {rim.version}",
        )


def _measurements(report: SpdmReport) -> dict[str, str]:
    firmware = {} if report.fwid is None else {"fwid": report.fwid.hex()}
    return {
        **{f"measurement_{index}": value for index, value in report.measurements.items()},
        **_versions(report.driver_version, report.vbios.hex()),
        **firmware,
    }


def _versions(driver: str, vbios: str) -> dict[str, str]:
    # In hex, as everything that a policy pins: the driver's ASCII, the VBIOS' five bytes.
    return {"driver_version": driver.encode().hex(), "vbios_version": vbios}


def _verify_tokens(evidence: Evidence, trust: Trust) -> Claims:
    if "jwks" not in evidence.collateral:
        raise refused(Refusal.NO_COLLATERAL, "tokens come with the service's key set 'jwks'")
    is_replaced = Platform.NVIDIA in trust.roots
    roots = believed_roots(trust, Platform.NVIDIA, ())
    named = roots.fingerprints if is_replaced else None
    service, tokens = verify_tokens(evidence.body, evidence.collateral["jwks"], named, trust.at)
    if not service.is_good:
        raise refused(Refusal.WRONG_MEASUREMENT, "NVIDIA's service does not approve these GPUs")
    first, *others = [_token_claims(token, roots.assurance) for token in tokens]
    return replace(first, companions=tuple(others))


def _token_claims(token: GpuToken, assurance: Assurance) -> Claims:
    claims = token.claims
    if claims.measres != "success" or not claims.is_nonce_match:
        raise refused(
            Refusal.WRONG_MEASUREMENT,
            f"NVIDIA's service found measurements {claims.measres or 'absent'!r} at {token.name}",
        )
    return Claims(
        platform=Platform.NVIDIA,
        assurance=assurance,
        measurements=_versions(
            claims.driver_version, claims.vbios_version.replace(".", "").lower()
        ),
        report_data=_nonce(claims.eat_nonce),
        is_debug=claims.dbgstat != "disabled" or claims.secboot is not True,
        tcb_status="UpToDate",
        chip=claims.ueid,
        issued_at=datetime.fromtimestamp(claims.iat, UTC),
        details={
            "driver": claims.driver_version,
            "vbios": claims.vbios_version,
            "model": claims.hwmodel,
            "name": token.name,
            "ueid": claims.ueid,
            "warning": claims.warning or "",
        },
    )


def _nonce(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise refused(Refusal.MALFORMED, f"a token's nonce: {error}") from error
