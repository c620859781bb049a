"""Quotes and keys, byte by byte: what a TPM signs is all that is believed."""

from collections.abc import Callable
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cutlayer.errors import AttestationError
from cutlayer.tee.tpm_attest import (
    TpmKey,
    TpmSignature,
    parse_quote,
    parse_signature,
    pcr_measurements,
    verify_quote,
)
from cutlayer.tee.tpm_keys import parse_public
from cutlayer.tee.tpm_reader import sized
from tests.tpm_worlds import public_area, quote_message, sign

PCRS = {0: bytes(32), 7: b"\7" * 32}
NONCE = bytes(range(32))
MESSAGE = quote_message(PCRS, NONCE)
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(AttestationError) as caught:
        action()
    return caught.value.refusal


def outcome(action: Callable[[], object]) -> str | None:
    """The refusal's name, or None."""
    try:
        action()
    except AttestationError as error:
        return error.refusal
    return None


def _rsa(scheme: int, how: padding.AsymmetricPadding) -> bytes:
    value = RSA_KEY.sign(MESSAGE, how, hashes.SHA256())
    return scheme.to_bytes(2, "big") + bytes.fromhex("000b") + sized(value)


@pytest.mark.parametrize(
    ("signature", "key"),
    [
        (_rsa(0x0014, padding.PKCS1v15()), RSA_KEY.public_key()),
        (_rsa(0x0016, PSS), RSA_KEY.public_key()),
        (sign(EC_KEY, MESSAGE), EC_KEY.public_key()),
    ],
    ids=["rsassa", "rsapss", "ecdsa"],
)
def test_every_scheme_is_checked(signature: bytes, key: TpmKey) -> None:
    quote = verify_quote(MESSAGE, parse_signature(signature), key, {"sha256": PCRS})
    assert quote.nonce == NONCE
    assert quote.selections == (("sha256", (0, 7)),)
    forged = MESSAGE.replace(NONCE, bytes(32))
    name = refusal(lambda: verify_quote(forged, parse_signature(signature), key, {"sha256": PCRS}))
    assert name == "bad-signature"


def test_measurements_have_the_names_of_policies() -> None:
    quote = parse_quote(MESSAGE)
    assert pcr_measurements(quote, {"sha256": PCRS}) == {"pcr0": "00" * 32, "pcr7": "07" * 32}


@pytest.mark.parametrize(
    ("pcrs", "expected"),
    [
        ({0: bytes(32), 7: b"\6" * 32}, "bad-signature"),
        ({0: bytes(32)}, "no-collateral"),
        ({0: bytes(32), 7: b"\7" * 31}, "malformed"),
        ({0: bytes(31), 7: b"\7" * 33}, "malformed"),
    ],
)
def test_pcr_values_are_those_that_were_signed(pcrs: dict[int, bytes], expected: str) -> None:
    signature = parse_signature(sign(EC_KEY, MESSAGE))
    name = refusal(lambda: verify_quote(MESSAGE, signature, EC_KEY.public_key(), {"sha256": pcrs}))
    assert name == expected


def test_scheme_of_another_kind_of_key_is_refused() -> None:
    signature = parse_signature(sign(EC_KEY, MESSAGE))
    name = refusal(lambda: verify_quote(MESSAGE, signature, RSA_KEY.public_key(), {"sha256": PCRS}))
    assert name == "bad-signature"


def test_short_key_is_refused() -> None:
    key = rsa.generate_private_key(65537, 1024)
    value = key.sign(MESSAGE, padding.PKCS1v15(), hashes.SHA256())
    signature = TpmSignature(scheme="rsassa", hash_name="sha256", value=value)
    with pytest.raises(AttestationError, match="1024 bits"):
        verify_quote(MESSAGE, signature, key.public_key(), {"sha256": PCRS})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ff544347", "ff544348"),
        ("ff5443478018", "ff5443478017"),
        ("00000001000b03", "00000001000403"),
        ("00000001000b03", "00000011000b03"),
        ("00000001000b03", "00000001000b05"),
    ],
    ids=["no magic", "no quote", "SHA-1 bank", "17 banks", "too many PCRs"],
)
def test_malformed_quote_is_refused(old: str, new: str) -> None:
    changed = MESSAGE.replace(bytes.fromhex(old), bytes.fromhex(new), 1)
    assert changed != MESSAGE
    assert refusal(lambda: parse_quote(changed)) == "malformed"


def test_no_byte_may_be_missing_or_more() -> None:
    for size in range(len(MESSAGE)):
        assert refusal(lambda size=size: parse_quote(MESSAGE[:size])) == "malformed"
    assert refusal(lambda: parse_quote(MESSAGE + b"\0")) == "malformed"


@pytest.mark.parametrize("head", ["0014000400", "00100010", "001a000b", "ffff", ""])
def test_weak_or_unknown_signature_is_refused(head: str) -> None:
    assert refusal(lambda: parse_signature(bytes.fromhex(head))) == "malformed"


def test_key_is_read_with_and_without_its_size() -> None:
    area = public_area(EC_KEY.public_key())
    public = parse_public(area)
    assert public.key == EC_KEY.public_key()
    assert public.name == b"\0\x0b" + sha256(area[2:]).digest()
    assert parse_public(area[2:]) == public
    assert public.is_attestation_key
    assert not public.is_storage_key


@pytest.mark.parametrize(
    "attributes",
    [0x40072, 0x70072, 0x50070, 0x50062, 0x50052, 0x10072],
    ids=[
        "signs anything",
        "decrypts too",
        "may move to another TPM",
        "may move to another parent",
        "was made outside",
        "does not sign",
    ],
)
def test_key_of_another_kind_is_no_attestation_key(attributes: int) -> None:
    public = parse_public(public_area(EC_KEY.public_key(), attributes))
    assert not public.is_attestation_key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0023000b", "0008000b"),
        ("0023000b", "00230004"),
        ("000300100020", "000100100020"),
        ("000300100020", "000400100020"),
    ],
    ids=["keyed hash", "named by SHA-1", "P-192", "a point of another curve"],
)
def test_malformed_key_is_refused(old: str, new: str) -> None:
    area = public_area(EC_KEY.public_key())
    changed = area.replace(bytes.fromhex(old), bytes.fromhex(new), 1)
    assert changed != area
    assert refusal(lambda: parse_public(changed)) == "malformed"


@given(data=st.binary(max_size=200), kind=st.sampled_from(["0001000b", "0023000b", "0014000b", ""]))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes, kind: str) -> None:
    for parse in (parse_quote, parse_signature, parse_public):
        assert outcome(lambda parse=parse: parse(bytes.fromhex(kind) + data)) in (None, "malformed")


def test_any_changed_byte_makes_another_key_or_none() -> None:
    area = public_area(EC_KEY.public_key())[2:]
    names = {parse_public(area).name}
    num_refused = 0
    for place in range(len(area)):
        changed = area[:place] + bytes([area[place] ^ 1]) + area[place + 1 :]
        if outcome(lambda changed=changed: parse_public(changed)) is None:
            names.add(parse_public(changed).name)
        else:
            num_refused += 1
    assert len(names) + num_refused == len(area) + 1
