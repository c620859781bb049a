"""One certificate read from DER by hand: AMD signs chip keys under serial number 0.

`cryptography` warns about that serial today and announces to refuse it, so the chip's certificate
is never given to its X.509 parser; keys and signatures are still its work. It reads only what a
chip certificate needs and judges no chain.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from cutlayer.tee.refusal import Refusal, refused

__all__ = ["DerCertificate", "decode_tlv", "read_der_certificate"]

_SEQUENCE, _INTEGER, _BIT_STRING, _OCTET_STRING, _OID, _BOOLEAN = 0x30, 0x02, 0x03, 0x04, 0x06, 0x01
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_VERSION, _EXTENSIONS = 0xA0, 0xA3
_MAX_BYTES = 16 << 10
_PEM_BEGIN, _PEM_END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"


@dataclass(frozen=True, kw_only=True)
class DerCertificate:
    """The parts that its signature, its dates and its vendor's extensions need."""

    signed: bytes
    """The DER that the issuer signed (TBSCertificate)."""
    algorithm: str
    """Dotted OID of the signature's algorithm."""
    signature: bytes
    issuer: bytes
    """DER of the issuer's name."""
    subject: bytes
    """DER of its own name."""
    begin: datetime
    end: datetime
    public_key: bytes
    """DER SubjectPublicKeyInfo."""
    extensions: Mapping[str, bytes]
    """Values by dotted OID."""
    critical: frozenset[str]
    """OIDs of extensions that must be understood."""


def read_der_certificate(data: bytes, what: str) -> DerCertificate:
    """A certificate from DER or from one PEM block.

    Args:
        data: the bytes.
        what: its name, for the message.

    Raises:
        AttestationError: malformed.
    """
    try:
        return _certificate(_der_of(data))
    except (ValueError, IndexError, OverflowError) as error:
        raise refused(Refusal.MALFORMED, f"{what} is no certificate: {error}") from error


def decode_tlv(data: bytes, tag: int) -> bytes:
    """The content of the one DER element that `data` is.

    Raises:
        ValueError: another tag, a length that DER forbids, or bytes after it.
    """
    found, content, _, end = _element(data, 0)
    if found != tag or end != len(data):
        raise ValueError(f"tag 0x{found:02x} of {end} bytes where 0x{tag:02x} was expected")
    return content


def _der_of(data: bytes) -> bytes:
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{len(data)} bytes are too many")
    if _PEM_BEGIN not in data:
        return data
    text = data.split(_PEM_BEGIN, 1)[1].split(_PEM_END, 1)[0]
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"bad base64: {error}") from error


def _element(data: bytes, start: int) -> tuple[int, bytes, bytes, int]:
    """Tag, content, whole encoding and end of the element that begins at `start`."""
    if start + 2 > len(data):
        raise ValueError("it is cut off")
    tag, length, body = data[start], data[start + 1], start + 2
    if length >= 0x80:
        num_octets = length & 0x7F
        if not 1 <= num_octets <= 3:
            raise ValueError("a length that DER forbids")
        length = int.from_bytes(data[body : body + num_octets])
        body += num_octets
        if length < 0x80 or length >> (8 * (num_octets - 1)) == 0:
            raise ValueError("a length that is not the shortest form")
    end = body + length
    if end > len(data):
        raise ValueError("it is cut off")
    return tag, data[body:end], data[start:end], end


def _elements(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    position = 0
    while position < len(data):
        tag, content, whole, position = _element(data, position)
        yield tag, content, whole


def _expect(found: tuple[int, bytes, bytes], *tags: int) -> tuple[int, bytes, bytes]:
    if found[0] not in tags:
        raise ValueError(f"tag 0x{found[0]:02x} stands where another belongs")
    return found


def _certificate(der: bytes) -> DerCertificate:
    signed, algorithm, signature = list(_elements(decode_tlv(der, _SEQUENCE)))[:3]
    _, signature_bits, _ = _expect(signature, _BIT_STRING)
    fields = list(_elements(_expect(signed, _SEQUENCE)[1]))
    if fields[0][0] == _VERSION:
        fields = fields[1:]
    _expect(fields[0], _INTEGER)
    if fields[1][2] != algorithm[2]:
        raise ValueError("it names two signature algorithms")
    begin, end = (_time(*part[:2]) for part in _elements(_expect(fields[3], _SEQUENCE)[1]))
    extensions, critical = _extensions(fields[6:])
    return DerCertificate(
        signed=signed[2],
        algorithm=_algorithm(algorithm),
        signature=signature_bits[1:],
        issuer=_expect(fields[2], _SEQUENCE)[2],
        subject=_expect(fields[4], _SEQUENCE)[2],
        begin=begin,
        end=end,
        public_key=_expect(fields[5], _SEQUENCE)[2],
        extensions=extensions,
        critical=critical,
    )


def _algorithm(found: tuple[int, bytes, bytes]) -> str:
    parts = list(_elements(_expect(found, _SEQUENCE)[1]))
    return _oid(_expect(parts[0], _OID)[1])


def _extensions(fields: list[tuple[int, bytes, bytes]]) -> tuple[dict[str, bytes], frozenset[str]]:
    values: dict[str, bytes] = {}
    critical: set[str] = set()
    for tag, content, _ in fields:
        if tag != _EXTENSIONS:
            continue
        for _, extension, _ in _elements(decode_tlv(content, _SEQUENCE)):
            parts = list(_elements(extension))
            oid = _oid(_expect(parts[0], _OID)[1])
            if oid in values:
                raise ValueError(f"extension {oid} comes twice")
            values[oid] = _expect(parts[-1], _OCTET_STRING)[1]
            if len(parts) == 3 and _expect(parts[1], _BOOLEAN)[1] != b"\0":
                critical.add(oid)
    return values, frozenset(critical)


def _oid(content: bytes) -> str:
    numbers: list[int] = []
    value = 0
    for octet in content:
        value = value << 7 | octet & 0x7F
        if octet < 0x80:
            numbers.append(value)
            value = 0
    first = min(numbers[0] // 40, 2)
    return ".".join(str(number) for number in (first, numbers[0] - 40 * first, *numbers[1:]))


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        # RFC 5280 4.1.2.5.1: years 00 to 49 are of this century.
        text = ("20" if text[:2] < "50" else "19") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"tag 0x{tag:02x} is no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
