"""The request to `/dev/nsm`: its bytes, ioctl and replies; the device itself is not at hand."""

import ctypes
import fcntl
from pathlib import Path

import cbor2
import pytest

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.attesters.nitro import MAX_REPLY_BYTES, NSM_REQUEST, NitroAttester
from cutlayer.tee.evidence import Platform
from cutlayer.tee.nitro_document import decode_reply, encode_request

REPORT_DATA = bytes(range(32))


def test_the_request_is_the_modules_map() -> None:
    fields = {"user_data": REPORT_DATA, "nonce": None, "public_key": None}
    assert cbor2.loads(encode_request(REPORT_DATA)) == {"Attestation": fields}


def test_the_document_is_taken_from_the_reply() -> None:
    assert decode_reply(cbor2.dumps({"Attestation": {"document": b"doc"}})) == b"doc"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"Error": "InvalidArgument"}, "refused: InvalidArgument"),
        ({"Attestation": {}}, "without a document"),
        ({"DescribePCR": {}}, "without a document"),
        ([1, 2], "without a document"),
    ],
)
def test_other_replies_say_what_happened(reply: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        decode_reply(cbor2.dumps(reply))


def test_a_reply_that_is_no_cbor_is_named() -> None:
    with pytest.raises(ConfigError, match="no CBOR"):
        decode_reply(b"\xff\xff")


def test_a_machine_without_the_device_is_no_enclave(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does this run in an enclave"):
        NitroAttester().attest(AttesterSettings(source="nitro", root=tmp_path), REPORT_DATA)


def test_a_plain_file_is_no_security_module(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nsm").write_bytes(b"")
    with pytest.raises(ConfigError, match="is no Nitro security module"):
        NitroAttester().attest(AttesterSettings(source="nitro", root=tmp_path), REPORT_DATA)


def test_the_ioctls_message_holds_both_places_and_the_replys_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's side, played over the same memory layout: struct nsm_message of two iovecs."""

    def kernel(device: int, number: int, message: ctypes.Structure) -> int:
        words = (ctypes.c_uint64 * 4).from_buffer(message)
        asked = cbor2.loads(ctypes.string_at(words[0], words[1]))
        reply = cbor2.dumps({"Attestation": {"document": asked["Attestation"]["user_data"]}})
        assert (number, words[3]) == (0xC0200A00, MAX_REPLY_BYTES)
        ctypes.memmove(words[2], reply, len(reply))
        words[3] = len(reply)
        return 0

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nsm").write_bytes(b"")
    monkeypatch.setattr(fcntl, "ioctl", kernel)
    evidence = NitroAttester().attest(AttesterSettings(source="nitro", root=tmp_path), REPORT_DATA)
    assert (evidence.platform, evidence.body) == (Platform.NITRO, REPORT_DATA)
    assert NSM_REQUEST == 0xC0200A00
