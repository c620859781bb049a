"""The small DER reader agrees with the full parser, and anything else is malformed."""

import contextlib

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.errors import AttestationError
from cutlayer.tee.der_certificate import decode_tlv, read_der_certificate
from tests.unit.tee.authorities import AT, Authority, Wish, ec_key, issue


def made(years: int = 1) -> Authority:
    wish = Wish(
        end=AT.replace(year=AT.year + years), extensions={"1.3.6.1.4.1.3704.1.4": b"x" * 200}
    )
    return issue("somebody", ec_key(), None, wish)


@pytest.mark.parametrize("years", [1, 40])
def test_the_reader_agrees_with_the_full_parser(years: int) -> None:
    authority = made(years)
    full, own = authority.certificate, read_der_certificate(authority.der, "it")
    assert own.signed == full.tbs_certificate_bytes
    assert own.signature == full.signature
    assert own.algorithm == full.signature_algorithm_oid.dotted_string
    assert (own.issuer, own.subject) == (full.issuer.public_bytes(), full.subject.public_bytes())
    assert (own.begin, own.end) == (full.not_valid_before_utc, full.not_valid_after_utc)
    key = full.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert own.public_key == key
    assert own.extensions["1.3.6.1.4.1.3704.1.4"] == b"x" * 200
    assert set(own.extensions) == {one.oid.dotted_string for one in full.extensions}
    assert own.critical == {one.oid.dotted_string for one in full.extensions if one.critical}


def test_pem_is_read_as_its_der() -> None:
    authority = made()
    assert read_der_certificate(authority.pem, "it") == read_der_certificate(authority.der, "it")


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 50, 200, -1])
def test_a_certificate_that_is_cut_off_is_malformed(cut: int) -> None:
    with pytest.raises(AttestationError) as caught:
        read_der_certificate(made().der[:cut], "it")
    assert caught.value.refusal == "malformed"


def test_an_algorithm_of_nothing_is_malformed() -> None:
    parts = [b"\x30\x00", b"\x30\x00", b"\x03\x01\x00"]
    with pytest.raises(AttestationError):
        read_der_certificate(b"\x30\x07" + b"".join(parts), "it")


def test_bytes_after_a_certificate_are_malformed() -> None:
    with pytest.raises(AttestationError):
        read_der_certificate(made().der + b"\0", "it")


@pytest.mark.parametrize(
    "data",
    ["0281010005", "02820001 05", "0280", "028400000001 05", "0302 05", "0201"],
)
def test_lengths_that_der_forbids_are_refused(data: str) -> None:
    with pytest.raises(ValueError):
        decode_tlv(bytes.fromhex(data), 0x02)


GOOD = made().der


@settings(max_examples=300, deadline=None, derandomize=True)
@given(offset=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), tail=st.binary(max_size=8))
def test_changed_bytes_are_read_or_malformed_and_nothing_else(
    offset: int, value: int, tail: bytes
) -> None:
    data = GOOD[:offset] + bytes([value]) + tail + GOOD[offset + 1 + len(tail) :]
    with contextlib.suppress(AttestationError):
        read_der_certificate(data, "it")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_noise_is_malformed(noise: bytes) -> None:
    with pytest.raises(AttestationError):
        read_der_certificate(b"\x30" + noise, "it")
