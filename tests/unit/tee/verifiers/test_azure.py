"""Azure VMs of our own: hardware, runtime claims and vTPM must belong together."""

import hashlib
import json

import pytest

from cutlayer.errors import AttestationError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.policy import Policy, appraise
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.unit.tee.authorities import AT
from tests.unit.tee.azure_worlds import PCR4, AzureVm
from tests.unit.tee.snp_worlds import Wished, make_chip

NONCE = bytes(range(32))


@pytest.fixture(scope="module")
def vm() -> AzureVm:
    return AzureVm()


def judged(vm: AzureVm, evidence: Evidence, named: Platform = Platform.SEV_SNP) -> Claims:
    return claims_of(evidence, Trust(at=AT, roots={named: vm.chip.ark.pem}))


def refusal(vm: AzureVm, evidence: Evidence) -> str:
    with pytest.raises(AttestationError) as caught:
        judged(vm, evidence)
    return caught.value.refusal


def with_body(evidence: Evidence, body: bytes) -> Evidence:
    return Evidence(platform=evidence.platform, body=body, collateral=evidence.collateral)


def over_a_tdreport(vm: AzureVm) -> bytes:
    runtime = vm.runtime()
    tdreport = bytes(0x80) + hashlib.sha256(runtime).digest() + bytes(1024 - 0xA0)
    return vm.report(runtime, tdreport, report_type=4)


def test_hardware_and_vtpm_together_measure_paravisor_and_guest(vm: AzureVm) -> None:
    claims = judged(vm, vm.evidence(NONCE))
    assert (claims.platform, claims.assurance) == (Platform.AZURE, Assurance.SIMULATED)
    assert claims.measurements["measurement"] == "5a" * 48
    assert claims.measurements["pcr4"] == PCR4.hex()
    assert claims.report_data == NONCE
    assert claims.details["vm secure-boot"] == "True"
    assert claims.details["guest"] == "measured by the vTPM"
    wanted = {"measurement": ["5a" * 48], "pcr4": [PCR4.hex()]}
    policy = Policy(
        name="azure",
        platforms=[Platform.AZURE],
        least_assurance="simulated",
        measurements=wanted,
    )
    appraise(claims, policy, AT, NONCE)


def test_without_a_quote_the_guests_own_data_is_bound_and_it_is_not_measured(vm: AzureVm) -> None:
    body = vm.report(vm.runtime(user_data=b"\x07" * 32 + bytes(32)))
    claims = judged(vm, with_body(vm.evidence(), body))
    assert claims.report_data == b"\x07" * 32 + bytes(32)
    assert "pcr4" not in claims.measurements
    assert claims.details["guest"].startswith("not measured")
    assert judged(vm, vm.evidence()).report_data == b""


def test_a_root_named_for_azure_stands_for_the_hardware_inside(vm: AzureVm) -> None:
    claims = judged(vm, vm.evidence(NONCE), named=Platform.AZURE)
    assert claims.assurance is Assurance.SIMULATED


def test_amds_own_root_does_not_know_this_vm(vm: AzureVm) -> None:
    with pytest.raises(AttestationError) as caught:
        claims_of(vm.evidence(NONCE), Trust(at=AT))
    assert caught.value.refusal == "wrong-root"


def test_other_runtime_claims_are_not_those_that_the_hardware_binds(vm: AzureVm) -> None:
    good = vm.evidence(NONCE)
    hardware = good.body[32 : 32 + 1184]
    other = AzureVm(chip=vm.chip)
    assert refusal(vm, with_body(good, vm.report(other.runtime(), hardware))) == "wrong-binding"
    secure = good.body.replace(b'"secure-boot": true', b'"secure-boot":false')
    assert refusal(vm, with_body(good, secure)) == "wrong-binding"


def test_a_quote_by_another_vtpm_is_refused(vm: AzureVm) -> None:
    stolen = AzureVm(chip=vm.chip).quote(NONCE)
    assert refusal(vm, vm.evidence(NONCE, stolen)) == "wrong-root"
    mixed = stolen | {"ak": vm.public_area()}
    assert refusal(vm, vm.evidence(NONCE, mixed)) == "bad-signature"


def test_pcrs_that_the_quote_does_not_cover_are_refused(vm: AzureVm) -> None:
    assert refusal(vm, vm.evidence(NONCE, {"pcrs": b"\x45" * 32})) == "bad-signature"


@pytest.mark.parametrize("name", ["signature", "ak", "pcrs", "vcek", "chain"])
def test_each_missing_piece_is_missing_collateral(vm: AzureVm, name: str) -> None:
    good = vm.evidence(NONCE)
    rest = {key: value for key, value in good.collateral.items() if key != name}
    evidence = Evidence(platform=good.platform, body=good.body, collateral=rest)
    assert refusal(vm, evidence) == "no-collateral"


def test_another_nonce_is_another_binding(vm: AzureVm) -> None:
    claims = judged(vm, vm.evidence(NONCE))
    policy = Policy(name="p", platforms=[Platform.AZURE], least_assurance="simulated")
    with pytest.raises(AttestationError) as caught:
        appraise(claims, policy, AT, bytes(32))
    assert caught.value.refusal == "wrong-binding"


def test_hardware_of_another_machine_is_refused(vm: AzureVm) -> None:
    foreign = vm.evidence(NONCE, make_chip().collateral)
    assert refusal(vm, foreign) in ("bad-signature", "wrong-root")


def test_runtime_claims_that_the_guest_had_bound_by_itself_are_refused(vm: AzureVm) -> None:
    runtime = vm.runtime()
    bound = hashlib.sha256(runtime).digest()
    hardware = vm.chip.report(Wished(report_data=bound, vmpl=2))
    assert refusal(vm, with_body(vm.evidence(NONCE), vm.report(runtime, hardware))) == (
        "wrong-binding"
    )


def test_a_debug_vm_is_told_as_such(vm: AzureVm) -> None:
    runtime = vm.runtime()
    bound = hashlib.sha256(runtime).digest()
    hardware = vm.chip.report(Wished(report_data=bound, policy=0xB0000))
    assert judged(vm, with_body(vm.evidence(), vm.report(runtime, hardware))).is_debug


def test_a_trusted_launch_vm_is_no_confidential_one(vm: AzureVm) -> None:
    body = vm.report(vm.runtime(), report_type=1)
    assert refusal(vm, with_body(vm.evidence(), body)) == "other-platform"


def test_a_tdreport_needs_the_quote_over_it(vm: AzureVm) -> None:
    body = over_a_tdreport(vm)
    assert refusal(vm, with_body(vm.evidence(), body)) == "no-collateral"


def on_tdx(vm: AzureVm, quoter: SyntheticQuoter, bound: bytes) -> Evidence:
    quoted = quoter.evidence(bytes(range(48)), bound, AT)
    collateral = dict(quoted.collateral) | {"td_quote": quoted.body} | vm.quote(NONCE)
    return Evidence(platform=Platform.AZURE, body=over_a_tdreport(vm), collateral=collateral)


def test_a_tdreport_is_believed_through_the_quote_over_it_and_no_other(vm: AzureVm) -> None:
    quoter = SyntheticQuoter.create()
    trust = Trust(at=AT, roots={Platform.AZURE: quoter.root_pem})
    digest = hashlib.sha256(vm.runtime()).digest()
    claims = claims_of(on_tdx(vm, quoter, digest), trust)
    assert claims.measurements["mr_td"] == bytes(range(48)).hex()
    assert (claims.report_data, claims.assurance) == (NONCE, Assurance.SIMULATED)
    with pytest.raises(AttestationError) as caught:
        claims_of(on_tdx(vm, quoter, bytes(32)), trust)
    assert caught.value.refusal == "wrong-binding"


def test_a_tdreports_quote_goes_to_intels_verifier(vm: AzureVm) -> None:
    body = over_a_tdreport(vm)
    evidence = vm.evidence(extra={"td_quote": vm.chip.report(Wished())})
    assert refusal(vm, with_body(evidence, body)) in ("malformed", "other-platform")


@pytest.mark.parametrize("cut", [0, 4, 31, 32, 1184, 1235, 1300])
def test_a_report_that_is_cut_off_is_malformed(vm: AzureVm, cut: int) -> None:
    good = vm.evidence()
    assert refusal(vm, with_body(good, good.body[:cut])) == "malformed"


@pytest.mark.parametrize(
    "runtime",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys": 7}',
        b'{"keys": [{"kid": 1}]}',
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
def test_runtime_claims_of_another_shape_are_malformed(vm: AzureVm, runtime: bytes) -> None:
    assert refusal(vm, with_body(vm.evidence(), vm.report(runtime))) == "malformed"


@pytest.mark.parametrize(
    "key",
    [
        {"kid": "other", "kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kid": "HCLAkPub", "kty": "EC"},
        {"kid": "HCLAkPub", "kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kid": "HCLAkPub", "kty": "RSA", "n": "%%", "e": "AQAB"},
        {"kid": "HCLAkPub", "kty": "RSA", "n": "é", "e": "AQAB"},
    ],
)
def test_a_weak_or_absent_attestation_key_signs_nothing(vm: AzureVm, key: dict[str, str]) -> None:
    runtime = json.dumps({"keys": [key]}).encode()
    evidence = with_body(vm.evidence(NONCE), vm.report(runtime))
    assert refusal(vm, evidence) == "malformed"


def test_user_data_that_is_no_hex_is_malformed(vm: AzureVm) -> None:
    runtime = vm.runtime(user_data=b"\1").replace(b'"01"', b'"zz"')
    assert refusal(vm, with_body(vm.evidence(), vm.report(runtime))) == "malformed"
