"""Intel's quotes (TDX and SGX) over the package `dcap-qvl`: parse, verify at a time, read claims.

It judges no TCB status (`policy`) and fetches nothing. What the vendor's verifier says in prose
gets its name in `quote_refusals`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from types import ModuleType

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding

from cutlayer.errors import ConfigError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.certificate_chain import load_certificates
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote_refusals import refusal_of
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verifier import Trust

__all__ = ["COLLATERAL", "ParsedQuote", "dcap_package", "parse_quote", "verify_quote"]

COLLATERAL = "intel"
"""Name under which evidence carries dcap-qvl's QuoteCollateralV3 JSON."""

_HEADER_BYTES = 48
_SGX_PROD_ID_OFFSET = _HEADER_BYTES + 256
_SGX_DEBUG_BIT = 0x02
_TD_FIELDS = {
    "mr_td": "mr_td",
    "rtmr0": "rt_mr0",
    "rtmr1": "rt_mr1",
    "rtmr2": "rt_mr2",
    "rtmr3": "rt_mr3",
    "mr_seam": "mr_seam",
    "mr_signer_seam": "mr_signer_seam",
    "mr_config_id": "mr_config_id",
    "mr_owner": "mr_owner",
    "mr_owner_config": "mr_owner_config",
    "td_attributes": "td_attributes",
    "xfam": "xfam",
}
_SGX_FIELDS = {"mr_enclave": "mr_enclave", "mr_signer": "mr_signer", "attributes": "attributes"}


@dataclass(frozen=True, kw_only=True)
class ParsedQuote:
    """What a quote says of itself; nobody has vouched for it yet."""

    platform: Platform
    """TDX or SGX."""
    version: int
    measurements: Mapping[str, str]
    report_data: bytes
    is_debug: bool
    chain_pem: bytes
    """The certificates of the quoting key, leaf first; empty where the quote has none."""


def parse_quote(body: bytes) -> ParsedQuote:
    """Read a quote without any check of signatures.

    Raises:
        AttestationError: these bytes are no quote.
        ConfigError: dcap-qvl is not installed.
    """
    try:
        quote = dcap_package().Quote.parse(body)
        report = quote.report
    except ValueError as error:
        raise refused(Refusal.MALFORMED, f"this is no TDX or SGX quote: {error}") from error
    is_tdx = bool(quote.is_tdx())
    if is_tdx:
        measurements = _hex_fields(report, _TD_FIELDS)
        if hasattr(report, "mr_service_td"):
            measurements["mr_service_td"] = bytes(report.mr_service_td).hex()
        is_debug = report.td_attributes[0] != 0
    else:
        measurements = _hex_fields(report, _SGX_FIELDS) | _sgx_ids(body)
        is_debug = bool(report.attributes[0] & _SGX_DEBUG_BIT)
    return ParsedQuote(
        platform=Platform.TDX if is_tdx else Platform.SGX,
        version=int(quote.header.version),
        measurements=measurements,
        report_data=bytes(report.report_data),
        is_debug=is_debug,
        chain_pem=bytes(quote.cert_chain_pem_bytes() or b""),
    )


def verify_quote(evidence: Evidence, trust: Trust, kind: Platform) -> Claims:
    """Claims of a quote whose signatures, chain, revocation and dates hold at `trust.at`.

    Args:
        evidence: body: the quote; collateral `intel`: dcap-qvl's QuoteCollateralV3 as JSON.
        trust: time, and the root that replaces Intel's.
        kind: TDX or SGX, the kind of quote that is expected.

    Raises:
        AttestationError: it does not hold; `refusal` says why.
        ConfigError: dcap-qvl is not installed.
    """
    quote = parse_quote(evidence.body)
    if quote.platform is not kind:
        raise refused(Refusal.OTHER_PLATFORM, f"this is a {quote.platform} quote, not {kind}")
    root_pem = trust.roots.get(evidence.platform)
    verdict = _verdict(quote, evidence, trust.at, root_pem)
    pck = verdict.platform.pck
    return Claims(
        platform=evidence.platform,
        assurance=Assurance.HARDWARE_TEE if root_pem is None else Assurance.SIMULATED,
        measurements=quote.measurements,
        report_data=quote.report_data,
        is_debug=quote.is_debug,
        tcb_status=verdict.tcb.status,
        advisories=tuple(verdict.tcb.advisory_ids),
        tcb_evaluation=verdict.tcb.eval_data_number,
        chip=bytes(pck.ppid).hex(),
        details={
            "fmspc": bytes(pck.fmspc).hex(),
            "quote_version": str(quote.version),
            "tcb_date": verdict.platform.tcb_level.tcb_date,
        },
    )


class _Tcb(msgspec.Struct):
    status: str
    advisory_ids: list[str]
    eval_data_number: int


class _Pck(msgspec.Struct):
    ppid: list[int]
    fmspc: list[int]


class _TcbLevel(msgspec.Struct):
    tcb_date: str = msgspec.field(name="tcbDate")


class _PlatformVerdict(msgspec.Struct):
    pck: _Pck
    tcb_level: _TcbLevel


class _Verdict(msgspec.Struct):
    """The part that we read of dcap-qvl's QuoteClaims."""

    tcb: _Tcb
    platform: _PlatformVerdict


def _verdict(
    quote: ParsedQuote, evidence: Evidence, at: datetime, root_pem: bytes | None
) -> _Verdict:
    collateral_json = _collateral(evidence)
    root_der = None if root_pem is None else _der_of_root(root_pem)
    dcap = dcap_package()
    # The package counts seconds from 1970; evidence of an earlier time is not valid yet either.
    now_s = max(0, int(at.timestamp()))
    try:
        collateral = dcap.QuoteCollateralV3.from_json(collateral_json)
        claims = dcap.QuoteVerifier(root_der).verify_with_policy(
            evidence.body, collateral, now_s, dcap.QuotePolicy.claims_only(now_s)
        )
    except ValueError as error:
        raise refusal_of(str(error), quote.chain_pem, collateral_json, root_pem, at) from error
    return msgspec.json.decode(claims.to_json(), type=_Verdict)


def _collateral(evidence: Evidence) -> str:
    data = evidence.collateral.get(COLLATERAL)
    if data is None:
        raise refused(
            Refusal.NO_COLLATERAL,
            f"a quote is verified with Intel's TCB info, identities and revocation lists; put "
            f"them under {COLLATERAL!r} (--collateral {COLLATERAL}=FILE)",
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise refused(
            Refusal.MALFORMED, f"collateral {COLLATERAL!r} is no JSON: {error}"
        ) from error


def _der_of_root(pem: bytes) -> bytes:
    found = load_certificates(pem, "the policy's root")
    if len(found) != 1:
        raise refused(
            Refusal.WRONG_ROOT, f"the policy's root is {len(found)} certificates, not one"
        )
    return found[0].public_bytes(Encoding.DER)


def _hex_fields(report: object, names: Mapping[str, str]) -> dict[str, str]:
    return {ours: bytes(getattr(report, theirs)).hex() for ours, theirs in names.items()}


def _sgx_ids(body: bytes) -> dict[str, str]:
    # Two bytes each, little-endian in the report; as hex numbers that read like the signer's.
    pairs = {"isv_prod_id": _SGX_PROD_ID_OFFSET, "isv_svn": _SGX_PROD_ID_OFFSET + 2}
    return {name: body[at : at + 2][::-1].hex() for name, at in pairs.items()}


@cache
def dcap_package() -> ModuleType:
    """The verifier's package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import dcap_qvl
    except ImportError as error:
        raise ConfigError(
            "TDX and SGX quotes are verified by the package dcap-qvl, which is not installed; "
            "install cutlayer[tee]"
        ) from error
    assert isinstance(dcap_qvl, ModuleType)
    return dcap_qvl
