"""Signed manifests: what is signed is what is read."""

from collections.abc import Callable

import pytest

from cutlayer.errors import AttestationError
from cutlayer.tee.certificate_chain import root_fingerprints
from cutlayer.tee.rim import Rim, verify_rim
from tests.unit.tee.authorities import AT
from tests.unit.tee.nvidia_worlds import DRIVER, Gpu, measured


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


def verified(gpu: Gpu, data: bytes) -> Rim:
    return verify_rim(data, root_fingerprints(gpu.root.pem), AT)


def refusal(gpu: Gpu, data: bytes) -> str:
    with pytest.raises(AttestationError) as caught:
        verified(gpu, data)
    return caught.value.refusal


def test_manifest_says_version_and_values(gpu: Gpu) -> None:
    rim = verified(gpu, gpu.manifest())
    assert (rim.version, rim.product) == (DRIVER, "GH100")
    assert rim.golden == {index: {measured(index), "ff" * 48} for index in (1, 2, 3)}


def test_form_of_writing_does_not_matter(gpu: Gpu) -> None:
    written = gpu.manifest().replace(b"<Payload>", b"<Payload  ><!-- a comment -->")
    assert verified(gpu, written) == verified(gpu, gpu.manifest())


def _replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return change


def _nested(data: bytes) -> bytes:
    # The classic wrap: the signed document within another one.
    return b"<S>" + data + b"</S>"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_replaced(b'index="1"', b'index="4"'), "bad-signature"),
        (_replaced(b'URI=""', b'URI="#part"'), "bad-signature"),
        (_replaced(b"#enveloped-signature", b"#base64"), "bad-signature"),
        (_replaced(b"xmldsig-more#sha384", b"xmldsig-more#md5"), "bad-signature"),
        (_replaced(b"ecdsa-sha384", b"hmac-sha1"), "bad-signature"),
        (_replaced(b"<d:SignatureValue>", b"<d:SignatureValue>AAAA"), "bad-signature"),
        (_replaced(b"<d:SignatureValue>", b"<d:SignatureValue>!"), "malformed"),
        (_replaced(b"</S>", b"<d:Signature xmlns:d='urn:x'/></S>"), "bad-signature"),
        (_replaced(b"<d:X509Certificate>", b"<d:X509Certificate>AAAA"), "malformed"),
        (_nested, "bad-signature"),
        (lambda data: data[: len(data) // 2], "malformed"),
        (lambda data: b"<S/>", "malformed"),
        (_replaced(b"<Payload>", b"<Payload><Resource type='Measurement'/>"), "bad-signature"),
    ],
)
def test_changed_manifest_is_refused(
    gpu: Gpu, change: Callable[[bytes], bytes], expected: str
) -> None:
    assert refusal(gpu, change(gpu.manifest())) == expected


def test_second_signature_is_refused(gpu: Gpu) -> None:
    text = gpu.manifest()
    start, end = text.index(b"<d:Signature "), text.index(b"</d:Signature>") + 14
    assert refusal(gpu, text[:end] + text[start:end] + text[end:]) == "malformed"


@pytest.mark.parametrize(
    "golden", [{64: ["ab" * 48]}, {1: ["AB" * 48]}, {1: ["ab" * 32]}, {1: []}, {9**9: ["ab" * 48]}]
)
def test_signed_nonsense_is_malformed(gpu: Gpu, golden: dict[int, list[str]]) -> None:
    assert refusal(gpu, gpu.manifest(golden=golden)) == "malformed"


def test_signed_contradiction_is_malformed(gpu: Gpu) -> None:
    text = _unsigned(gpu)
    rows = text[text.index("<Resource") : text.index("</Payload>")]
    assert refusal(gpu, gpu.signed_xml(text.replace(rows, rows + rows))) == "malformed"


@pytest.mark.parametrize(
    "stated", [{"uri": "#part"}, {"first": "base64"}], ids=["of a part", "after another transform"]
)
def test_signature_over_something_else_is_refused(gpu: Gpu, stated: dict[str, str]) -> None:
    # Signed as it stands, by the right key: only what is stated to be signed is wrong.
    assert refusal(gpu, gpu.signed_xml(_unsigned(gpu), **stated)) == "bad-signature"


def test_signature_within_the_payload_is_refused(gpu: Gpu) -> None:
    moved = _unsigned(gpu).replace("@", "").replace("</Payload>", "@</Payload>")
    with pytest.raises(AttestationError, match="not the root's child"):
        verified(gpu, gpu.signed_xml(moved))


def _unsigned(gpu: Gpu) -> str:
    text = gpu.manifest().decode()
    start, end = text.index("<d:Signature "), text.index("</d:Signature>") + 14
    return text[:start] + "@" + text[end:]


def test_manifest_of_another_root_is_refused(gpu: Gpu) -> None:
    assert refusal(gpu, Gpu().manifest()) == "wrong-root"
