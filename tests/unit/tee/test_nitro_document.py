"""Nitro documents whose fields are anything at all: read, or malformed, and nothing else."""

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.errors import AttestationError
from cutlayer.tee.nitro_document import NitroDocument, parse_nitro_document
from tests.unit.tee.authorities import AT
from tests.unit.tee.nitro_worlds import ES384_HEADER, Module

GOOD = Module().payload()
KEYS = st.integers(-3, 40) | st.text(max_size=3) | st.booleans()
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def document(payload: bytes, header: bytes = ES384_HEADER) -> bytes:
    """Signed by nobody: the parser is what is tested."""
    return cbor2.dumps([header, {}, payload, bytes(96)])


def test_a_good_document_is_read_field_by_field() -> None:
    payload = cbor2.dumps(GOOD)
    found = parse_nitro_document(document(payload))
    assert (found.module_id, found.made_at) == ("i-1-enc2", AT)
    assert (found.user_data, found.nonce, found.public_key) == (bytes(range(32)), b"", b"")
    assert found.signed == cbor2.dumps(["Signature1", ES384_HEADER, b"", payload])
    assert len(found.pcrs) == 16


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(GOOD)), VALUES, min_size=1, max_size=3))
def test_any_value_in_any_field_is_read_or_malformed(change: dict[str, object]) -> None:
    data = document(cbor2.dumps(GOOD | change))
    try:
        assert isinstance(parse_nitro_document(data), NitroDocument)
    except AttestationError as error:
        name = error.refusal
    else:
        name = "malformed"
    assert name == "malformed"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(header=st.binary(max_size=20), payload=st.binary(max_size=200))
def test_envelopes_around_noise_are_malformed(header: bytes, payload: bytes) -> None:
    with pytest.raises(AttestationError) as caught:
        parse_nitro_document(document(payload, header))
    assert caught.value.refusal == "malformed"


@pytest.mark.parametrize(
    "payload",
    [
        # A huge power, a fraction by zero, a pattern, a loop: tags that decoders act upon.
        "c5821b7fffffffffffffff01",
        "d81e820100",
        "d8236128",
        "d81c81d81d00",
        "c2" * 3000 + "41ff",
        "9f" * 5000,
    ],
)
def test_tags_that_decoders_act_upon_do_no_harm(payload: str) -> None:
    with pytest.raises(AttestationError) as caught:
        parse_nitro_document(document(bytes.fromhex(payload)))
    assert caught.value.refusal == "malformed"
