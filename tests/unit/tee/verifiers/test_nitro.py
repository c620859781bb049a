"""Nitro documents of a module of our own: verified under a named root, refused otherwise."""

from datetime import timedelta

import cbor2
import pytest

from cutlayer.errors import AttestationError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.policy import Policy, appraise
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.unit.tee.authorities import AT, ec_key, issue, rsa_key
from tests.unit.tee.nitro_worlds import PCR0, Module

REPORT_DATA = bytes(range(32))
POLICY = Policy(
    name="nitro",
    platforms=[Platform.NITRO],
    least_assurance="simulated",
    measurements={"pcr0": [PCR0.hex()]},
)


@pytest.fixture(scope="module")
def module() -> Module:
    return Module()


def judged(module: Module, evidence: Evidence, at=AT) -> Claims:
    return claims_of(evidence, Trust(at=at, roots={Platform.NITRO: module.root.pem}))


def refusal(module: Module, body: bytes, at=AT) -> str:
    with pytest.raises(AttestationError) as caught:
        judged(module, Evidence(platform=Platform.NITRO, body=body), at)
    return caught.value.refusal


def test_a_document_binds_user_data_and_pcrs_and_its_time(module: Module) -> None:
    claims = judged(module, module.evidence())
    assert claims.assurance is Assurance.SIMULATED
    assert (claims.report_data, claims.issued_at) == (REPORT_DATA, AT)
    assert (claims.measurements["pcr0"], claims.is_debug) == (PCR0.hex(), False)
    appraise(claims, POLICY, AT, REPORT_DATA)


def test_the_same_document_is_nothing_under_awss_own_root(module: Module) -> None:
    with pytest.raises(AttestationError) as caught:
        claims_of(module.evidence(), Trust(at=AT))
    assert caught.value.refusal == "wrong-root"


def test_the_tag_of_cose_is_allowed(module: Module) -> None:
    envelope = cbor2.loads(module.evidence().body)
    tagged = cbor2.dumps(cbor2.CBORTag(18, envelope))
    assert judged(module, Evidence(platform=Platform.NITRO, body=tagged)).report_data


def test_zeros_in_pcr_0_mean_debug(module: Module) -> None:
    claims = judged(module, module.evidence({"pcrs": {i: bytes(48) for i in range(16)}}))
    with pytest.raises(AttestationError) as caught:
        appraise(claims, POLICY, AT, REPORT_DATA)
    assert caught.value.refusal == "debug"


def test_without_user_data_nothing_is_bound(module: Module) -> None:
    claims = judged(module, module.evidence({"user_data": None}))
    assert claims.report_data == b""
    with pytest.raises(AttestationError) as caught:
        appraise(claims, POLICY, AT, REPORT_DATA)
    assert caught.value.refusal == "wrong-binding"


def test_an_old_document_is_stale_while_its_chain_still_lives(module: Module) -> None:
    later = AT + timedelta(minutes=6)
    claims = judged(module, module.evidence(), later)
    with pytest.raises(AttestationError) as caught:
        appraise(claims, POLICY, later, REPORT_DATA)
    assert caught.value.refusal == "stale"


def test_a_chain_that_ran_out_is_expired(module: Module) -> None:
    assert refusal(module, module.evidence().body, AT + timedelta(days=40)) == "expired"
    assert refusal(module, module.evidence().body, AT - timedelta(days=40)) == "not-yet-valid"


def test_every_flipped_bit_is_refused(module: Module) -> None:
    good = module.evidence().body
    for offset in range(3, len(good), 97):
        bad = good[:offset] + bytes([good[offset] ^ 4]) + good[offset + 1 :]
        name = refusal(module, bad)
        assert name in ("bad-signature", "bad-chain", "malformed", "wrong-root"), offset


def test_another_modules_signature_is_refused(module: Module) -> None:
    payload = module.payload()
    stranger = Module(root=module.root)
    assert refusal(module, stranger.document(payload)) == "bad-signature"


def test_a_module_key_of_another_kind_is_refused(module: Module) -> None:
    leaf = issue("i-1", rsa_key(), module.root)
    payload = module.payload({"certificate": leaf.der, "cabundle": [module.root.der]})
    assert refusal(module, module.document(payload)) == "bad-signature"


def test_a_bundle_in_the_wrong_order_is_no_chain(module: Module) -> None:
    payload = module.payload()
    bundle = payload["cabundle"]
    assert isinstance(bundle, list)
    swapped = module.document(payload | {"cabundle": bundle[::-1]})
    assert refusal(module, swapped) == "bad-chain"


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "SHA256"},
        {"module_id": 7},
        {"module_id": ""},
        {"timestamp": "now"},
        {"timestamp": 10**30},
        {"timestamp": True},
        {"pcrs": {}},
        {"pcrs": {1: bytes(48)}},
        {"pcrs": {0: bytes(32)}},
        {"pcrs": {"0": bytes(48)}},
        {"pcrs": {99: bytes(48), 0: bytes(48)}},
        {"certificate": None},
        {"certificate": b"none"},
        {"cabundle": []},
        {"cabundle": ["x"]},
        {"cabundle": [b""] * 40},
        {"user_data": "text"},
        {"nonce": 10**5000},
    ],
)
def test_a_document_with_a_field_of_another_kind_is_malformed(
    module: Module, change: dict[str, object]
) -> None:
    assert refusal(module, module.document(module.payload(change))) == "malformed"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x84",
        cbor2.dumps([b"", {}, b"", bytes(95)]),
        cbor2.dumps(["", {}, b"", bytes(96)]),
        cbor2.dumps({"a": 1}),
        b"\x81" * 3000,
        bytes(70_000),
    ],
)
def test_what_is_no_signed_message_is_malformed(module: Module, body: bytes) -> None:
    assert refusal(module, body) == "malformed"


def test_only_es384_is_believed(module: Module) -> None:
    for header in ({1: -7}, {}, {1: -35, 2: [1]}):
        body = module.document(module.payload(), cbor2.dumps(header))
        assert refusal(module, body) == "malformed"


def test_bytes_after_document_or_payload_are_malformed(module: Module) -> None:
    assert refusal(module, module.evidence().body + b"\0") == "malformed"
    padded = cbor2.dumps(module.payload()) + b"\0"
    assert refusal(module, module.document(padded)) == "malformed"


def test_a_root_made_by_someone_else_under_awss_name_is_not_it(module: Module) -> None:
    fake = Module(root=issue("aws.nitro-enclaves", ec_key()))
    assert refusal(module, fake.evidence().body) == "wrong-root"
