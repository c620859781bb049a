"""Names of what Intel's side can refuse: the test authority signs each wrong thing itself."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from cutlayer.errors import AttestationError, ConfigError
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import COLLATERAL, dcap_package, parse_quote
from cutlayer.tee.quote_refusals import refusal_of
from cutlayer.tee.synthetic_authority import SyntheticAuthority
from cutlayer.tee.synthetic_collateral import TcbState, raw_signature
from cutlayer.tee.synthetic_quoter import Pretence, SyntheticQuoter
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.unit.tee.evidence_samples import published

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
AUTHORITY = SyntheticAuthority.create()
QUOTER = SyntheticQuoter(AUTHORITY)
GOOD = QUOTER.evidence(bytes(48), bytes(32), AT)
Json = dict[str, object]


def judged(evidence: Evidence) -> Claims:
    return claims_of(evidence, Trust(at=AT, roots={Platform.SIMULATED: QUOTER.root_pem}))


def refusal(evidence: Evidence) -> str:
    with pytest.raises(AttestationError) as caught:
        judged(evidence)
    return caught.value.refusal


def with_collateral(change: Callable[[dict[str, str]], object]) -> Evidence:
    whole = json.loads(GOOD.collateral[COLLATERAL])
    change(whole)
    return msgspec.structs.replace(GOOD, collateral={COLLATERAL: json.dumps(whole).encode()})


def resigned(name: str, changes: Json) -> Evidence:
    """TCB info or identity that says something else, signed by whom it should be."""

    def change(whole: dict[str, str]) -> None:
        whole[name] = json.dumps(json.loads(whole[name]) | changes)
        signature = raw_signature(AUTHORITY.tcb_signer.key, whole[name].encode())
        whole[f"{name}_signature"] = signature.hex()

    return with_collateral(change)


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("tcb_info", {"fmspc": "B0C06F000000"}, "tcb"),
        ("tcb_info", {"tdxModuleIdentities": []}, "tcb"),
        ("tcb_info", {"tcbLevels": []}, "tcb"),
        ("tcb_info", {"id": "SGX"}, "other-platform"),
        ("tcb_info", {"nextUpdate": "2026-11-20T00:00:00Z"}, "expired"),
        ("tcb_info", {"issueDate": "2026-11-22T00:00:00Z"}, "not-yet-valid"),
        ("tcb_info", {"issueDate": "yesterday"}, "malformed"),
        ("tcb_info", {"tcbLevels": 1}, "malformed"),
        ("qe_identity", {"mrsigner": "AB" * 32}, "tcb"),
        ("qe_identity", {"isvprodid": 3}, "tcb"),
        ("qe_identity", {"attributes": "19" + "00" * 15}, "tcb"),
        ("qe_identity", {"miscselect": "00000001"}, "tcb"),
        ("qe_identity", {"tcbLevels": []}, "tcb"),
        ("qe_identity", {"id": "QE"}, "other-platform"),
        ("qe_identity", {"nextUpdate": "2026-11-20T00:00:00Z"}, "expired"),
        ("qe_identity", {"issueDate": "2026-11-22T00:00:00Z"}, "not-yet-valid"),
    ],
)
def test_what_the_vendor_says_otherwise_is_refused_by_name(
    name: str, changes: Json, wanted: str
) -> None:
    assert refusal(resigned(name, changes)) == wanted


def test_an_unchanged_list_passes_when_it_is_signed_again() -> None:
    assert judged(resigned("tcb_info", {})) == judged(GOOD)


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
def test_what_the_vendor_did_not_sign_is_refused(name: str) -> None:
    evidence = with_collateral(lambda c: c.update({name: c[name].replace("UpToDate", "OutOfDate")}))
    assert refusal(evidence) == "bad-signature"


def test_a_revoked_chip_cannot_bring_another_list() -> None:
    revoked = Pretence(tcb=TcbState(is_revoked=True))
    evidence = QUOTER.evidence(bytes(48), bytes(32), AT, revoked)
    whole = json.loads(evidence.collateral[COLLATERAL])
    start, end = AT - timedelta(days=1), AT + timedelta(days=1)
    stranger = SyntheticAuthority.create()
    others = [
        whole["root_ca_crl"],
        stranger.revocation_list(stranger.platform_ca, start, end).hex(),
        AUTHORITY.revocation_list(stranger.platform_ca, start, end).hex(),
        "",
    ]
    for other in others:
        changed = json.dumps(whole | {"pck_crl": other}).encode()
        found = refusal(msgspec.structs.replace(evidence, collateral={COLLATERAL: changed}))
        assert found in {"bad-chain", "malformed"}


@pytest.mark.parametrize("status", ["OutOfDate", "SWHardeningNeeded"])
def test_a_status_is_left_to_the_policy(status: str) -> None:
    evidence = QUOTER.evidence(bytes(48), bytes(32), AT, Pretence(tcb=TcbState(status=status)))
    assert judged(evidence).tcb_status == status


@pytest.mark.parametrize(
    ("prose", "wanted"),
    [
        ("Debug mode is enabled", "debug"),
        ("SEPT_VE_DISABLE is not enabled", "wrong-measurement"),
        ("Invalid MR service TD", "wrong-measurement"),
        ("QE report validation failed", "tcb"),
        ("TCB status is invalid: Revoked", "tcb"),
        ("QE report hash mismatch", "bad-signature"),
        ("ISV enclave report signature is invalid", "bad-signature"),
        ("CertRevoked", "revoked"),
        ("Certificate chain is too short in quote", "malformed"),
        ("something that no release has said so far", "malformed"),
    ],
)
def test_prose_without_a_cheap_example_has_a_name_too(prose: str, wanted: str) -> None:
    error = refusal_of(f"Verification failed: {prose}", b"", "{}", None, AT)
    assert error.refusal == wanted
    assert "Verification failed" not in str(error)


def test_a_chain_that_looks_whole_is_still_refused() -> None:
    # The verifier's word counts, whatever the second look finds.
    pems = AUTHORITY.pck_chain_pem
    given = GOOD.collateral[COLLATERAL].decode()
    prose = "Failed to verify certificate chain"
    assert refusal_of(prose, pems, given, QUOTER.root_pem, AT).refusal == "bad-chain"


def test_two_roots_are_none() -> None:
    two = QUOTER.root_pem + SyntheticAuthority.create().root.pem
    with pytest.raises(AttestationError) as caught:
        claims_of(GOOD, Trust(at=AT, roots={Platform.SIMULATED: two}))
    assert caught.value.refusal == "wrong-root"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dcap_qvl", None)
    dcap_package.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"install cutlayer\[tee\]"):
            judged(GOOD)
    finally:
        dcap_package.cache_clear()


@pytest.mark.system
@pytest.mark.parametrize(
    ("name", "version", "has_service_td"),
    [
        ("quote_v5_sample.dat", 5, None),
        ("tdx_prod_quote_SPR_E4.dat", 4, False),
        ("cos113.dat", 4, False),
        ("quote_h200_2026-09-04.bin", 4, False),
    ],
)
def test_quotes_without_collateral_are_read_but_not_believed(
    name: str, version: int, has_service_td: bool | None
) -> None:
    body = published(name)
    quote = parse_quote(body)
    assert (quote.platform, quote.version, quote.is_debug) == (Platform.TDX, version, False)
    assert len(bytes.fromhex(quote.measurements["mr_td"])) == 48
    if has_service_td is not None:
        assert ("mr_service_td" in quote.measurements) is has_service_td
    with pytest.raises(AttestationError) as caught:
        claims_of(Evidence(platform=Platform.TDX, body=body), Trust(at=AT))
    assert caught.value.refusal == "no-collateral"
