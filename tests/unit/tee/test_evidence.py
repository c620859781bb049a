"""Evidence as a file and on the wire, the binding, and how levels of several pieces join."""

import base64
import json
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.errors import AttestationError, ConfigError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.binding import Binding
from cutlayer.tee.evidence import (
    MAX_EVIDENCE_BYTES,
    Evidence,
    Platform,
    decode_evidence,
    read_evidence,
    read_limited,
)
from cutlayer.tee.policy import Policy
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from cutlayer.tee.verify import verify

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
GPU = Evidence(platform=Platform.NVIDIA, body=b"report")
WHOLE = Evidence(
    platform=Platform.TDX, body=b"\0quote", collateral={"intel": b"{}"}, companions=[GPU]
)


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    path.write_bytes(WHOLE.to_json())
    assert read_evidence(path) == WHOLE
    as_json = json.loads(WHOLE.to_json())
    assert as_json["platform"] == "tdx"
    assert base64.b64decode(as_json["body"]) == b"\0quote"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"platform": "z80", "body": ""}',
        b'{"platform": "tdx", "body": "not base64!"}',
        b'{"platform": "tdx", "body": "", "colour": 1}',
        b"\xff\xfe",
        b'{"platform": "tdx", "body": "", "companions": ' + b"[" * 100_000,
        b" " * (MAX_EVIDENCE_BYTES + 1),
    ],
)
def test_what_is_no_evidence_is_malformed(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(AttestationError) as caught:
        decode_evidence(data)
    assert caught.value.refusal == "malformed"
    path = tmp_path / "evidence.json"
    path.write_bytes(data)
    with pytest.raises(AttestationError, match=r"evidence\.json") as caught:
        read_evidence(path)
    assert caught.value.refusal == "malformed"


@given(st.binary(max_size=400))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    try:
        decode_evidence(data)
    except AttestationError as error:
        refusal = error.refusal
    else:
        refusal = Refusal.MALFORMED
    assert refusal == Refusal.MALFORMED


def test_a_missing_file_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read evidence"):
        read_evidence(tmp_path / "none.json")


def test_a_vendors_file_of_any_size_is_read_to_the_limit_alone(tmp_path: Path) -> None:
    path = tmp_path / "quote"
    path.write_bytes(bytes(MAX_EVIDENCE_BYTES))
    assert len(read_limited(path, "quote")) == MAX_EVIDENCE_BYTES
    path.write_bytes(bytes(MAX_EVIDENCE_BYTES + 1))
    with pytest.raises(ConfigError, match=r"quote .* is larger than any evidence"):
        read_limited(path, "quote")


def binding(**changes: bytes) -> bytes:
    values = {"tls_key_sha256": b"k" * 32, "nonce": b"n" * 32, "spec_digest": b"s" * 32} | changes
    return Binding(**values).report_data()


def test_the_binding_is_a_hash_over_a_form_that_never_changes() -> None:
    canonical = (
        b"\xa4\x63key\x58\x20" + b"k" * 32 + b"\x64spec\x58\x20" + b"s" * 32
        + b"\x65nonce\x58\x20" + b"n" * 32 + b"\x68cutlayer\x69binding 1"
    )  # fmt: skip
    assert binding() == sha256(canonical).digest()


def test_key_nonce_and_spec_each_change_the_binding() -> None:
    others = [
        binding(tls_key_sha256=b"x" * 32),
        binding(nonce=b"x" * 32),
        binding(nonce=b""),
        binding(spec_digest=b""),
        # The same bytes under other names.
        binding(nonce=b"s" * 32, spec_digest=b"n" * 32),
    ]
    assert len({binding(), *others}) == 6


def test_labels_lead_back_to_levels_and_simulated_is_loud() -> None:
    assert [Assurance.named(level.label) for level in Assurance] == list(Assurance)
    assert Assurance.SIMULATED.label == "SIMULATED"
    with pytest.raises(KeyError):
        Assurance.named("certified")


@pytest.mark.parametrize("reason", list(Refusal))
def test_an_error_carries_its_reason_by_name_and_in_its_text(reason: Refusal) -> None:
    error = refused(reason, "because")
    assert (error.refusal, str(error)) == (reason, f"{reason}: because")


def test_every_reason_is_explained_in_the_documents() -> None:
    page = Path(__file__).parents[3] / "docs" / "attestation.md"
    text = page.read_text(encoding="utf-8")
    assert [reason for reason in Refusal if f"`{reason}`" not in text] == []


@pytest.fixture(scope="module")
def quoter() -> SyntheticQuoter:
    return SyntheticQuoter.create()


def judged(quoter: SyntheticQuoter, folder: Path, companions: list[Evidence]) -> Assurance:
    (folder / "root.pem").write_bytes(quoter.root_pem)
    policy = Policy(
        name="test",
        platforms=[Platform.SIMULATED],
        least_assurance="simulated",
        roots={Platform.SIMULATED: folder / "root.pem"},
    )
    made = quoter.evidence(bytes(48), bytes(32), AT)
    whole = msgspec.structs.replace(made, companions=companions)
    result = verify(whole, policy, AT, bytes(32))
    assert (result.policy, result.policy_digest, result.at) == ("test", policy.digest, AT)
    return result.assurance


def test_a_result_names_its_policy_and_its_time(quoter: SyntheticQuoter, tmp_path: Path) -> None:
    assert judged(quoter, tmp_path, []) is Assurance.SIMULATED


def test_what_the_policy_does_not_want_is_not_even_parsed() -> None:
    policy = Policy(name="test", platforms=[Platform.TDX], measurements={"mr_td": ["00"]})
    with pytest.raises(AttestationError) as caught:
        verify(Evidence(platform=Platform.SGX, body=b"no quote"), policy, AT, None)
    assert caught.value.refusal == "other-platform"


def test_simulated_machines_do_not_pass_a_policy_that_does_not_say_so(
    quoter: SyntheticQuoter, tmp_path: Path
) -> None:
    (tmp_path / "root.pem").write_bytes(quoter.root_pem)
    made = quoter.evidence(bytes(48), bytes(32), AT)
    for platform in (Platform.SIMULATED, Platform.TDX):
        policy = Policy(
            name="test",
            platforms=[platform],
            measurements={"mr_td": ["00" * 48]},
            roots={platform: tmp_path / "root.pem"},
        )
        with pytest.raises(AttestationError) as caught:
            verify(msgspec.structs.replace(made, platform=platform), policy, AT, bytes(32))
        assert caught.value.refusal == "low-assurance"


def test_only_an_accelerator_may_stand_beside_a_cpu(
    quoter: SyntheticQuoter, tmp_path: Path
) -> None:
    with pytest.raises(AttestationError) as caught:
        judged(quoter, tmp_path, [quoter.evidence(bytes(48), bytes(32), AT)])
    assert caught.value.refusal == "other-platform"
    nested = msgspec.structs.replace(GPU, companions=[GPU])
    with pytest.raises(AttestationError) as caught:
        judged(quoter, tmp_path, [nested])
    assert caught.value.refusal == "malformed"


def test_an_endless_file_is_read_to_the_limit_alone() -> None:
    with pytest.raises(AttestationError, match="more than 4 MiB"):
        read_evidence(Path("/dev/zero"))
