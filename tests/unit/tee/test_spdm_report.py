"""GPU reports, field by field: what is read is all that there is, once each."""

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cutlayer.errors import AttestationError
from cutlayer.tee.spdm_report import SpdmReport, parse_spdm_report

NONCE = bytes(range(32))
BLOCK = bytes.fromhex("0101 0500 01 0200 abcd")
"""Number 1, DMTF, five bytes: a digest of two."""
OTHER = bytes.fromhex("0201 0500 01 0200 0001")
DRIVER = bytes.fromhex("0300 0600") + b"550.1\0"
VBIOS = bytes.fromhex("0600 0800 0074009620000000")


def report(
    records: bytes = BLOCK + OTHER, num_blocks: int = 2, opaque: bytes = DRIVER + VBIOS
) -> bytes:
    head = bytes.fromhex("11600000") + bytes([num_blocks]) + len(records).to_bytes(3, "little")
    response = head + records + bytes(32) + len(opaque).to_bytes(2, "little") + opaque
    return bytes.fromhex("11e001ff") + NONCE + b"\0" + response + bytes(95) + b"\7"


def read_or_refusal(data: bytes) -> SpdmReport | str:
    try:
        return parse_spdm_report(data)
    except AttestationError as error:
        return error.refusal


def test_every_field_is_read() -> None:
    found = parse_spdm_report(report())
    assert found.nonce == NONCE
    assert found.measurements == {0: "abcd", 1: "0001"}
    assert (found.driver_version, found.vbios_version) == ("550.1", "96.00.74.00.20")
    assert found.signed == report()[:-96]
    assert found.signature == (0, 7)
    assert not found.has_video_decoder
    assert parse_spdm_report(report(opaque=bytes.fromhex("0b000100aa"))).has_video_decoder
    assert parse_spdm_report(report(opaque=bytes.fromhex("15000100aa"))).is_pcie_protected


@pytest.mark.parametrize(
    "data",
    [
        report(records=BLOCK + BLOCK),
        report(num_blocks=3),
        report(num_blocks=1),
        report(records=BLOCK + bytes.fromhex("0001 0500 01 0200 0001")),
        report(records=BLOCK + bytes.fromhex("0202 0500 01 0200 0001")),
        report(records=BLOCK + bytes.fromhex("0201 0500 01 0300 0001")),
        report(records=BLOCK + bytes.fromhex("0201 0300 01 0000")),
        report(records=BLOCK + OTHER[:-1]),
        report(opaque=DRIVER + DRIVER),
        report(opaque=DRIVER + VBIOS[:-1]),
        report(opaque=b"\0"),
        report() + b"\0",
        report()[:-1],
        b"\x12" + report()[1:],
        report()[:37] + b"\x11\xe0" + report()[39:],
        report()[:37],
        b"",
    ],
    ids=[
        "one number twice",
        "too few blocks",
        "too many blocks",
        "number zero",
        "no DMTF measurement",
        "a value longer than its block",
        "an empty value",
        "a block that is cut off",
        "one field twice",
        "a field that is cut off",
        "half a field",
        "a byte more",
        "a byte less",
        "another version",
        "a request for a response",
        "no response",
        "nothing",
    ],
)
def test_anything_else_is_malformed(data: bytes) -> None:
    assert read_or_refusal(data) == "malformed"


@given(data=st.binary(max_size=300), place=st.integers(0, 170), cut=st.integers(0, 40))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_malformed(data: bytes, place: int, cut: int) -> None:
    whole = report()
    for tried in (data, whole[:place] + data + whole[place + cut :]):
        found = read_or_refusal(tried)
        assert found == "malformed" or isinstance(found, SpdmReport)
