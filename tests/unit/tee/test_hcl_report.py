"""HCL reports around any JSON and any header: read, or refused by name, and nothing else."""

import hashlib
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.errors import AttestationError
from cutlayer.tee.evidence import Platform
from cutlayer.tee.hcl_report import check_runtime_binding, parse_hcl_report

KEY = {"kid": "HCLAkPub", "kty": "RSA", "n": "AQAB", "e": "AQAB"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["keys", "vm-configuration", "user-data"])


def report(runtime: bytes, hash_type: int = 1, report_data: bytes = bytes(64)) -> bytes:
    hardware = (bytes(0x50) + report_data).ljust(1184, b"\0")
    claims = struct.pack("<5I", 0, 1, 2, hash_type, len(runtime))
    return b"HCLA" + bytes(28) + hardware + claims + runtime


@pytest.mark.parametrize(("hash_type", "name"), [(1, "sha256"), (2, "sha384"), (3, "sha512")])
def test_the_digest_is_the_one_that_the_header_names(hash_type: int, name: str) -> None:
    runtime = json.dumps({"keys": [KEY]}).encode()
    bound = hashlib.new(name, runtime).digest().ljust(64, b"\0")
    found = parse_hcl_report(report(runtime, hash_type, bound))
    assert (found.platform, found.hash_name) == (Platform.SEV_SNP, name)
    check_runtime_binding(found, found.report_data)
    with pytest.raises(AttestationError, match="other runtime claims"):
        check_runtime_binding(found, bytes(64))


@pytest.mark.parametrize("hash_type", [0, 4, 2**32 - 1])
def test_other_digests_are_malformed(hash_type: int) -> None:
    with pytest.raises(AttestationError) as caught:
        parse_hcl_report(report(b'{"keys": []}', hash_type))
    assert caught.value.refusal == "malformed"


def test_a_digest_with_something_after_it_is_another_binding() -> None:
    runtime = b'{"keys": []}'
    bound = hashlib.sha256(runtime).digest() + b"\1" * 32
    with pytest.raises(AttestationError) as caught:
        check_runtime_binding(parse_hcl_report(report(runtime)), bound)
    assert caught.value.refusal == "wrong-binding"


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.dictionaries(FIELDS, JSON))
def test_any_json_is_read_or_malformed(change: dict[str, object]) -> None:
    name = "malformed"
    try:
        found = parse_hcl_report(report(json.dumps({"keys": [KEY]} | change).encode()))
        assert found.user_data is not None
        found.attestation_key()
    except AttestationError as error:
        name = error.refusal
    assert name == "malformed"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(header=st.binary(min_size=20, max_size=20), tail=st.binary(max_size=100))
def test_any_header_is_read_or_refused_by_name(header: bytes, tail: bytes) -> None:
    with pytest.raises(AttestationError) as caught:
        parse_hcl_report(b"HCLA" + bytes(28 + 1184) + header + tail)
    assert caught.value.refusal in ("malformed", "other-platform")
