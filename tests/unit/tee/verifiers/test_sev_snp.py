"""SEV-SNP reports of a chip of our own: verified under a named root, refused otherwise."""

from dataclasses import replace

import pytest
from cryptography import x509

from cutlayer.errors import AttestationError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.unit.tee.authorities import AT, Wish, ec_key, issue, revocation_list
from tests.unit.tee.snp_worlds import LeafWish, SnpChip, Wished, make_chip, with_leaf

TURIN = LeafWish(product="Turin-B0", tcb={9: 1, 1: 2, 2: 0, 3: 5, 8: 77}, chip=bytes(range(8)))
TURIN_REPORT = Wished(
    version=5, tcb=bytes([1, 2, 0, 5, 0, 0, 0, 77]), chip=bytes(range(8)).ljust(64, b"\0")
)


@pytest.fixture(scope="module")
def chip() -> SnpChip:
    return make_chip()


def judged(chip: SnpChip, evidence: Evidence) -> Claims:
    return claims_of(evidence, Trust(at=AT, roots={Platform.SEV_SNP: chip.ark.pem}))


def refusal(chip: SnpChip, evidence: Evidence) -> str:
    with pytest.raises(AttestationError) as caught:
        judged(chip, evidence)
    return caught.value.refusal


def test_a_report_says_what_firmware_measured_and_a_named_root_makes_it_simulated(
    chip: SnpChip,
) -> None:
    claims = judged(chip, chip.evidence(Wished(report_data=b"x" * 32)))
    assert claims.assurance is Assurance.SIMULATED
    assert claims.measurements["measurement"] == "5a" * 48
    assert claims.measurements["reported_tcb"] == "04000000000016d5"
    assert claims.measurements["policy"] == "0000000000030000"
    assert claims.report_data == b"x" * 32 + bytes(32)
    assert (claims.is_debug, claims.tcb_status) == (False, "UpToDate")
    assert claims.chip == bytes(range(64)).hex()
    assert claims.details["cpuid"] == "family 0x19 model 0x1 stepping 0x1"
    assert claims.details["platform"] == "smt, ecc, alias-check-complete"


def test_every_field_stands_where_amd_puts_it(chip: SnpChip) -> None:
    tcb = "04000000000016d5"
    assert judged(chip, chip.evidence(Wished(version=5, vmpl=2))).measurements == {
        "measurement": "5a" * 48,
        "host_data": b"h".hex() * 32,
        "id_key_digest": b"i".hex() * 48,
        "author_key_digest": b"a".hex() * 48,
        "report_id": b"r".hex() * 32,
        "report_id_ma": b"m".hex() * 32,
        "family_id": b"F".hex() * 16,
        "image_id": b"I".hex() * 16,
        "policy": "0000000000030000",
        "platform_info": "0000000000000025",
        "guest_svn": "00000007",
        "vmpl": "00000002",
        **dict.fromkeys(("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb"), tcb),
    }


def test_the_same_report_is_nothing_under_amds_own_root(chip: SnpChip) -> None:
    with pytest.raises(AttestationError) as caught:
        claims_of(chip.evidence(), Trust(at=AT))
    assert caught.value.refusal == "wrong-root"


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_every_known_version_is_read(chip: SnpChip, version: int) -> None:
    claims = judged(chip, chip.evidence(Wished(version=version)))
    assert ("cpuid" in claims.details, "mitigations" in claims.details) == (
        version >= 3,
        version >= 5,
    )


def test_turin_orders_its_firmware_versions_otherwise(chip: SnpChip) -> None:
    turin = with_leaf(chip, TURIN)
    claims = judged(turin, turin.evidence(TURIN_REPORT))
    assert claims.details["tcb"] == "fmc 1, boot loader 2, tee 0, snp 5, microcode 77"


def test_a_providers_key_signs_too_and_names_the_provider(chip: SnpChip) -> None:
    vlek = with_leaf(chip, LeafWish(product="Milan", chip=None, provider="Cloud A"), "vlek")
    claims = judged(vlek, vlek.evidence(Wished(flags=1 << 2)))
    assert claims.details["provider"] == "Cloud A"
    # A measurement too: whose machines are guarded is what a policy wants to name.
    assert bytes.fromhex(claims.measurements["provider"]) == b"Cloud A"
    assert "provider" not in judged(chip, chip.evidence()).measurements
    assert claims.chip == bytes(range(64)).hex()


def test_a_providers_key_does_not_pass_for_a_chips(chip: SnpChip) -> None:
    vlek = with_leaf(chip, LeafWish(product="Milan", chip=None, provider="Cloud A"))
    assert refusal(chip, vlek.evidence()) == "bad-chain"


def test_the_hosts_table_of_certificates_does_as_well(chip: SnpChip) -> None:
    assert judged(chip, chip.evidence(collateral={"auxblob": chip.table()})).chip is not None


def test_a_hidden_chip_number_leaves_the_claims_without_one(chip: SnpChip) -> None:
    assert judged(chip, chip.evidence(Wished(chip=bytes(64)))).chip is None


def test_firmware_that_can_fall_back_is_provisional(chip: SnpChip) -> None:
    older = bytes([4, 0, 0, 0, 0, 0, 22, 200])
    assert judged(chip, chip.evidence(Wished(committed_tcb=older))).tcb_status == "Provisional"


def test_a_debug_guest_is_told_as_such(chip: SnpChip) -> None:
    assert judged(chip, chip.evidence(Wished(policy=0xB0000))).is_debug


def test_a_migration_agent_shows_in_the_details(chip: SnpChip) -> None:
    assert judged(chip, chip.evidence(Wished(policy=0x70000))).details["migratable"] == "True"


@pytest.mark.parametrize(
    ("wished", "name"),
    [
        (Wished(version=1), "malformed"),
        (Wished(version=6), "malformed"),
        (Wished(flags=7 << 2), "bad-signature"),
        (Wished(flags=1 << 1), "bad-signature"),
        (Wished(flags=1 << 2), "no-collateral"),
        (Wished(tcb=bytes([4, 0, 0, 0, 0, 0, 22, 212])), "tcb"),
        (Wished(chip=bytes(63) + b"\1"), "wrong-chip"),
    ],
)
def test_reports_that_do_not_fit_their_certificate_are_refused(
    chip: SnpChip, wished: Wished, name: str
) -> None:
    assert refusal(chip, chip.evidence(wished)) == name


def test_every_signed_and_unsigned_byte_counts(chip: SnpChip) -> None:
    good = chip.evidence()
    for offset in [0x50, 0x90, 0x1A0, 0x29F, 0x2A0, 0x2E8, 0x330, 1183]:
        body = bytearray(good.body)
        body[offset] ^= 1
        bad = Evidence(platform=good.platform, body=bytes(body), collateral=good.collateral)
        assert refusal(chip, bad) in ("bad-signature", "malformed"), hex(offset)


@pytest.mark.parametrize("leave_out", ["vcek", "chain"])
def test_missing_certificates_are_missing_collateral(chip: SnpChip, leave_out: str) -> None:
    rest = {name: der for name, der in chip.collateral.items() if name != leave_out}
    assert refusal(chip, chip.evidence(collateral=rest)) == "no-collateral"


def test_another_chips_certificate_is_no_help(chip: SnpChip) -> None:
    other = with_leaf(chip, LeafWish())
    assert refusal(chip, chip.evidence(collateral=other.collateral)) == "bad-signature"


def test_a_certificate_signed_by_nobody_in_the_chain_breaks_it(chip: SnpChip) -> None:
    stranger = make_chip()
    mixed = stranger.collateral | {"chain": chip.collateral["chain"]}
    assert refusal(chip, stranger.evidence(collateral=mixed)) == "bad-chain"


def test_a_signing_authority_that_signs_with_a_curve_is_not_amds(chip: SnpChip) -> None:
    ask = issue("SEV-Test", ec_key(), chip.ark)
    curved = with_leaf(replace(chip, ask=ask), LeafWish())
    assert refusal(chip, curved.evidence()) == "bad-chain"


def test_a_certificate_has_its_dates_checked(chip: SnpChip) -> None:
    past = Wish(begin=AT.replace(year=2020), end=AT.replace(year=2025))
    coming = Wish(begin=AT.replace(year=2027), end=AT.replace(year=2030))
    for wish, name in ((past, "expired"), (coming, "not-yet-valid")):
        dated = with_leaf(chip, LeafWish(wish=wish))
        assert refusal(chip, dated.evidence()) == name


def test_a_revoked_signing_authority_is_refused(chip: SnpChip) -> None:
    fine = chip.collateral | {"crl": revocation_list(chip.ark, [5])}
    claims = judged(chip, chip.evidence(collateral=fine))
    assert claims.details["revocation"] == "checked"
    serial = chip.ask.certificate.serial_number
    listed = chip.collateral | {"crl": revocation_list(chip.ark, [serial])}
    assert refusal(chip, chip.evidence(collateral=listed)) == "revoked"


def test_critical_extensions_that_nobody_here_knows_are_refused(chip: SnpChip) -> None:
    odd = with_leaf(chip, LeafWish(wish=Wish(extensions={"1.2.3": b"\5\0"}, is_critical=True)))
    assert refusal(chip, odd.evidence()) == "bad-chain"


def test_a_certificate_without_amds_extensions_is_no_vcek(chip: SnpChip) -> None:
    plain = issue("plain", ec_key(), chip.ask, Wish(is_authority=False))
    collateral = chip.collateral | {"vcek": plain.der}
    assert refusal(chip, chip.evidence(collateral=collateral)) == "malformed"


@pytest.mark.parametrize("cut", [10, 100, 200])
def test_a_table_that_is_cut_off_is_malformed(chip: SnpChip, cut: int) -> None:
    evidence = chip.evidence(collateral={"auxblob": chip.table()[:cut]})
    assert refusal(chip, evidence) == "malformed"


def test_a_parser_that_refuses_serial_zero_changes_no_verdict(
    chip: SnpChip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: bytes) -> x509.Certificate:
        certificate = real(data)
        if certificate.subject.rfc4514_string() == "CN=SEV-VCEK":
            raise ValueError("invalid serial number")
        return certificate

    real = x509.load_der_x509_certificate
    monkeypatch.setattr(x509, "load_der_x509_certificate", refuse)
    assert judged(chip, chip.evidence()).chip is not None
