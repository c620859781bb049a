"""NVIDIA's reference integrity manifests: which measurements a driver or a VBIOS must give.

A manifest is SWID XML with an enveloped signature; it is believed up to NVIDIA's root for them.
It fetches none, and compares with a report that somebody else verified.
"""

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cutlayer.tee.certificate_chain import check_chain, issuer_key, load_certificates
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.xml_canonical import XmlElement, canonical, parse_xml

__all__ = ["Rim", "compare", "verify_rim"]

_DSIG = "http://www.w3.org/2000/09/xmldsig#"
_SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
_SHA384 = "http://www.w3.org/2001/04/xmlenc#sha384"
_CANONICAL = (
    "http://www.w3.org/2006/12/xml-c14n11",
    "http://www.w3.org/TR/2001/REC-xml-c14n-20010315",
)
_ENVELOPED = f"{_DSIG}enveloped-signature"
_SIGNATURE_METHOD = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_DIGEST_METHOD = "http://www.w3.org/2001/04/xmldsig-more#sha384"
_HASH = re.compile(r"[0-9a-f]{96}")
_INDEX = re.compile(r"[0-9]{1,2}")
_NUM_MEASUREMENTS = 64
_COORDINATE_BYTES = 48


@dataclass(frozen=True, kw_only=True)
class Rim:
    """What a verified manifest says."""

    version: str
    """Of the driver or the VBIOS, as people write it."""
    product: str
    golden: Mapping[int, frozenset[str]]
    """Accepted values (hex) by NVIDIA's zero-based index; only of what must match."""


def verify_rim(data: bytes, roots: Collection[str], at: datetime) -> Rim:
    """Check the manifest's signature and chain, and read it.

    Args:
        data: XML.
        roots: SHA-256 fingerprints of believed roots.
        at: time of the verdict.

    Raises:
        AttestationError: malformed, bad-signature, bad-chain, wrong-root, expired.
    """
    document = parse_xml(data)
    signature = _only([e for e in document.walk() if e.name == (_DSIG, "Signature")], "Signature")
    if signature not in document.elements:
        raise refused(Refusal.BAD_SIGNATURE, "the manifest's signature is not the root's child")
    info = _child(signature, "SignedInfo")
    _check_digest(document, signature, info)
    _check_signed(info, signature, _signer(signature, roots, at))
    return _read(document)


def _child(element: XmlElement, local: str) -> XmlElement:
    return _only(element.named(_DSIG, local), local)


def _only(found: list[XmlElement], what: str) -> XmlElement:
    if len(found) != 1:
        raise refused(Refusal.MALFORMED, f"the manifest has {len(found)} elements {what}, not one")
    return found[0]


def _check_digest(document: XmlElement, signature: XmlElement, info: XmlElement) -> None:
    reference = _child(info, "Reference")
    steps = [e.attribute("Algorithm") for e in _child(reference, "Transforms").elements]
    is_whole = reference.attribute("URI") == "" and len(steps) == 2
    if not is_whole or steps[0] != _ENVELOPED or steps[1] not in _CANONICAL:
        raise refused(Refusal.BAD_SIGNATURE, "the manifest's signature is not over the whole of it")
    _check_algorithm(_child(reference, "DigestMethod"), (_DIGEST_METHOD,))
    stated = _decode(_child(reference, "DigestValue"))
    found = hashlib.sha384(canonical(document, without=signature)).digest()
    if not hmac.compare_digest(stated, found):
        raise refused(Refusal.BAD_SIGNATURE, "the manifest was changed after it was signed")


def _check_algorithm(element: XmlElement, accepted: Collection[str]) -> None:
    if element.attribute("Algorithm") not in accepted:
        raise refused(Refusal.BAD_SIGNATURE, f"algorithm {element.attribute('Algorithm')}")


def _decode(element: XmlElement) -> bytes:
    try:
        return base64.b64decode("".join(element.text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(Refusal.MALFORMED, f"{element.tag} is no base64: {error}") from error


def _signer(
    signature: XmlElement, roots: Collection[str], at: datetime
) -> ec.EllipticCurvePublicKey:
    data = _child(_child(signature, "KeyInfo"), "X509Data")
    chain: list[x509.Certificate] = []
    for element in data.named(_DSIG, "X509Certificate"):
        chain += load_certificates(_decode(element), "the manifest's certificate")
    check_chain(chain, at=at, roots=roots, what="the manifest's chain")
    key = issuer_key(chain[0])
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise refused(Refusal.BAD_SIGNATURE, "the manifest's key is not an elliptic curve's")
    return key


def _check_signed(info: XmlElement, signature: XmlElement, key: ec.EllipticCurvePublicKey) -> None:
    _check_algorithm(_child(info, "CanonicalizationMethod"), _CANONICAL)
    _check_algorithm(_child(info, "SignatureMethod"), (_SIGNATURE_METHOD,))
    value = _decode(_child(signature, "SignatureValue"))
    r, s = (int.from_bytes(half) for half in (value[:_COORDINATE_BYTES], value[_COORDINATE_BYTES:]))
    try:
        key.verify(encode_dss_signature(r, s), canonical(info), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise refused(Refusal.BAD_SIGNATURE, "the manifest is not signed by its key") from None


def _read(document: XmlElement) -> Rim:
    meta = _only(document.named(_SWID, "Meta"), "Meta")
    payload = _only(document.named(_SWID, "Payload"), "Payload")
    golden: dict[int, frozenset[str]] = {}
    for resource in payload.named(_SWID, "Resource"):
        is_measured = resource.attribute("type") == "Measurement"
        if not is_measured or resource.attribute("active") != "True":
            continue
        index = _index(resource)
        if index in golden:
            raise refused(Refusal.MALFORMED, f"the manifest names measurement {index} twice")
        golden[index] = _hashes(resource, index)
    if not golden:
        raise refused(Refusal.MALFORMED, "the manifest names no active measurement")
    return Rim(
        version=meta.attribute("colloquialVersion") or "",
        product=meta.attribute("product") or "",
        golden=golden,
    )


def _index(resource: XmlElement) -> int:
    text = resource.attribute("index") or ""
    if not _INDEX.fullmatch(text) or int(text) >= _NUM_MEASUREMENTS:
        raise refused(Refusal.MALFORMED, f"the manifest names a measurement {text[:20]!r}")
    return int(text)


def _hashes(resource: XmlElement, index: int) -> frozenset[str]:
    found = [
        value
        for (namespace, local), value in resource.expanded_attributes().items()
        if namespace == _SHA384 and local.startswith("Hash")
    ]
    if not found or not all(_HASH.fullmatch(value) for value in found):
        raise refused(Refusal.MALFORMED, f"the manifest's values for {index} are no SHA-384")
    return frozenset(found)


def compare(rim: Rim, measurements: Mapping[int, str], ignored: Collection[int]) -> None:
    """Refuse a report whose measurements are not the manifest's.

    Args:
        rim: verified.
        measurements: hex by NVIDIA's zero-based index.
        ignored: indices that say nothing on this part.

    Raises:
        AttestationError: wrong-measurement, with the indices.
    """
    wrong = [
        index
        for index, accepted in sorted(rim.golden.items())
        if index not in ignored and measurements.get(index) not in accepted
    ]
    if wrong:
        indices = ", ".join(str(index) for index in wrong)
        raise refused(
            Refusal.WRONG_MEASUREMENT,
            f"measurements {indices} are not those of {rim.product} {rim.version}'s manifest",
        )
