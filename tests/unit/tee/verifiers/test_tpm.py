"""Whose attestation keys are believed: activated ones, certified ones, no others."""

from datetime import timedelta

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from cutlayer.errors import AttestationError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.tpm_trust import ATTESTATION_USAGE, ENDORSEMENT_USAGE, key_pem
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.tpm_worlds import QuotedTpm, maker, quoted_tpm
from tests.unit.tee.authorities import AT

NONCE = bytes(range(32))


@pytest.fixture(scope="module")
def tpm() -> QuotedTpm:
    return quoted_tpm(NONCE)


def judged(evidence: Evidence, roots: bytes, later: timedelta = timedelta()) -> Claims:
    return claims_of(evidence, Trust(at=AT + later, roots={Platform.TPM: roots}))


def refusal(evidence: Evidence, roots: bytes, later: timedelta = timedelta()) -> str:
    with pytest.raises(AttestationError) as caught:
        judged(evidence, roots, later)
    return caught.value.refusal


def with_collateral(evidence: Evidence, **pieces: bytes) -> Evidence:
    return msgspec.structs.replace(evidence, collateral={**evidence.collateral, **pieces})


def test_activated_key_says_its_pcrs_and_is_the_chip(tpm: QuotedTpm) -> None:
    claims = judged(tpm.evidence, key_pem(tpm.key.public_key()))
    assert claims.assurance is Assurance.MEASURED_BOOT
    assert claims.report_data == NONCE
    assert claims.measurements["pcr7"] == "07" * 32
    assert claims.chip == claims.measurements["ak_sha256"]


def test_key_of_no_root_and_no_activation_is_refused(tpm: QuotedTpm) -> None:
    assert refusal(tpm.evidence, key_pem(quoted_tpm().key.public_key())) == "wrong-root"
    with pytest.raises(AttestationError, match="wrong-root"):
        claims_of(tpm.evidence, Trust(at=AT))


def test_pin_beside_roots_is_found(tpm: QuotedTpm) -> None:
    judged(tpm.evidence, maker(AT).pem + key_pem(tpm.key.public_key()))


@pytest.mark.parametrize("usage", [ATTESTATION_USAGE, None])
def test_certified_key_is_believed(tpm: QuotedTpm, usage: x509.ObjectIdentifier | None) -> None:
    authority = maker(AT)
    chain = authority.certify(tpm.key.public_key(), usage, AT)
    claims = judged(with_collateral(tpm.evidence, ak_certificate=chain), authority.pem)
    assert claims.details["trusted_by"].startswith("a certificate")


def test_certificate_is_checked(tpm: QuotedTpm) -> None:
    authority = maker(AT)
    key = tpm.key.public_key()
    good = with_collateral(
        tpm.evidence, ak_certificate=authority.certify(key, ATTESTATION_USAGE, AT)
    )
    assert refusal(good, maker(AT).pem) == "wrong-root"
    assert refusal(good, key_pem(quoted_tpm().key.public_key())) == "wrong-root"
    assert refusal(good, authority.pem, later=timedelta(days=3)) == "expired"
    assert refusal(good, authority.pem, later=-timedelta(days=3)) == "not-yet-valid"
    stolen = authority.certify(quoted_tpm().key.public_key(), ATTESTATION_USAGE, AT)
    assert refusal(with_collateral(tpm.evidence, ak_certificate=stolen), authority.pem) == (
        "bad-chain"
    )


@pytest.mark.parametrize("usage", [ENDORSEMENT_USAGE, ExtendedKeyUsageOID.SERVER_AUTH])
def test_certificate_for_another_use_is_refused(
    tpm: QuotedTpm, usage: x509.ObjectIdentifier
) -> None:
    # A company's root that certifies web servers too must not make them TPMs.
    authority = maker(AT)
    chain = authority.certify(tpm.key.public_key(), usage, AT)
    assert refusal(with_collateral(tpm.evidence, ak_certificate=chain), authority.pem) == (
        "bad-chain"
    )


def test_key_that_may_sign_anything_is_refused() -> None:
    forger = quoted_tpm(attributes=0x40072)
    assert refusal(forger.evidence, key_pem(forger.key.public_key())) == "bad-signature"


def test_pcr_values_of_another_length_are_refused(tpm: QuotedTpm) -> None:
    roots = key_pem(tpm.key.public_key())
    for pcrs in (b"", bytes(32 * 7), bytes(32 * 9)):
        assert refusal(with_collateral(tpm.evidence, pcrs=pcrs), roots) == "malformed"
    other = with_collateral(tpm.evidence, pcrs=bytes(32 * 8))
    assert refusal(other, roots) == "bad-signature"


@pytest.mark.parametrize("part", ["signature", "ak", "pcrs"])
def test_every_part_is_asked_for(tpm: QuotedTpm, part: str) -> None:
    pieces = {name: data for name, data in tpm.evidence.collateral.items() if name != part}
    bare = msgspec.structs.replace(tpm.evidence, collateral=pieces)
    with pytest.raises(AttestationError, match=f"no-collateral: .*'{part}'"):
        judged(bare, key_pem(tpm.key.public_key()))


def test_pin_of_another_kind_of_key_is_malformed(tpm: QuotedTpm) -> None:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert refusal(tpm.evidence, pem) == "malformed"
    broken = b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    assert refusal(tpm.evidence, broken) == "malformed"
