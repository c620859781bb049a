"""The certificate of the key that signs a SEV-SNP report: the chip's own or its provider's.

It reads AMD's extensions and checks who signed it; the chain above is `certificate_chain`'s.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from cutlayer.tee.certificate_chain import issuer_key
from cutlayer.tee.der_certificate import DerCertificate, decode_tlv, read_der_certificate
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.snp_report import Tcb

__all__ = ["SnpSigner", "certificates_of_table", "check_signed_by", "read_snp_signer"]

_AMD = "1.3.6.1.4.1.3704.1"
_PRODUCT, _CHIP, _PROVIDER = f"{_AMD}.2", f"{_AMD}.4", f"{_AMD}.5"
_TCB = {"boot_loader": 1, "tee": 2, "snp": 3, "microcode": 8}
_FMC = f"{_AMD}.3.9"
_KEY_USAGE, _BASIC_CONSTRAINTS = "2.5.29.15", "2.5.29.19"
_RSA_PSS = "1.2.840.113549.1.1.10"
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)
_INTEGER, _IA5_STRING, _OCTET_STRING = 0x02, 0x16, 0x04
_CHIP_BYTES = 64
_ENTRY_BYTES = 24
_TABLE_NAMES = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "vcek",
    uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"): "vlek",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ask",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "ark",
}


@dataclass(frozen=True, kw_only=True)
class SnpSigner:
    """A VCEK or VLEK certificate: what AMD says about the key."""

    certificate: DerCertificate
    key: ec.EllipticCurvePublicKey
    product: str
    """Such as "Milan-B0"."""
    tcb: Tcb
    """Firmware versions that the key is derived from."""
    chip_id: bytes | None
    """64 bytes (Turin: 8, then zeros); a provider's key has none."""
    provider: str | None
    """Name of the cloud that a VLEK was made for."""


def read_snp_signer(data: bytes, what: str) -> SnpSigner:
    """A VCEK or VLEK certificate from DER or PEM.

    Args:
        data: the bytes.
        what: its name, for the message.

    Raises:
        AttestationError: malformed, or not of such a key.

    Source: AMD document 57230, VCEK certificate and KDS interface, table of X.509 extensions.
    """
    certificate = read_der_certificate(data, what)
    values = certificate.extensions
    try:
        key = load_der_public_key(certificate.public_key)
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
            raise refused(Refusal.MALFORMED, f"{what}: its key is not of curve P-384")
        return SnpSigner(
            certificate=certificate,
            key=key,
            product=decode_tlv(values[_PRODUCT], _IA5_STRING).decode("ascii"),
            tcb=_tcb(values),
            chip_id=_chip_id(values[_CHIP]) if _CHIP in values else None,
            provider=_provider(values[_PROVIDER]) if _PROVIDER in values else None,
        )
    except KeyError as error:
        raise refused(Refusal.MALFORMED, f"{what}: AMD's extension {error} is missing") from error
    except (ValueError, IndexError, UnsupportedAlgorithm) as error:
        raise refused(Refusal.MALFORMED, f"{what} is no VCEK or VLEK: {error}") from error


def check_signed_by(certificate: DerCertificate, issuer: x509.Certificate, what: str) -> None:
    """Refuse a certificate that this issuer did not sign.

    Args:
        certificate: of the chip or provider.
        issuer: AMD's signing authority.
        what: for the message.

    Raises:
        AttestationError: bad-chain.
    """
    if certificate.critical - {_KEY_USAGE, _BASIC_CONSTRAINTS}:
        raise refused(Refusal.BAD_CHAIN, f"{what} has critical extensions, unknown here")
    name = read_der_certificate(issuer.public_bytes(Encoding.DER), f"{what}'s issuer").subject
    key = issuer_key(issuer)
    if certificate.algorithm != _RSA_PSS or not isinstance(key, rsa.RSAPublicKey):
        raise refused(Refusal.BAD_CHAIN, f"{what} is not signed with RSA-PSS, as AMD does")
    try:
        key.verify(certificate.signature, certificate.signed, _PSS, hashes.SHA384())
    except InvalidSignature as error:
        raise refused(Refusal.BAD_CHAIN, f"{what} is not signed by the chain's first") from error
    if certificate.issuer != name:
        raise refused(Refusal.BAD_CHAIN, f"{what} names another issuer than the chain's first")


def certificates_of_table(data: bytes) -> dict[str, bytes]:
    """DER certificates of the table that a host hands to its guest (configfs-tsm's `auxblob`).

    Args:
        data: entries of GUID, offset and length, then the certificates.

    Raises:
        AttestationError: malformed.

    Source: AMD document 56421, GHCB specification, SNP extended guest request.
    """
    found: dict[str, bytes] = {}
    for start in range(0, len(data) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
        guid = uuid.UUID(bytes_le=data[start : start + 16])
        if guid.int == 0:
            return found
        offset = int.from_bytes(data[start + 16 : start + 20], "little")
        length = int.from_bytes(data[start + 20 : start + 24], "little")
        if offset + length > len(data):
            break
        if guid in _TABLE_NAMES:
            found[_TABLE_NAMES[guid]] = data[offset : offset + length]
    raise refused(Refusal.MALFORMED, "the host's certificate table is cut off")


def _tcb(values: Mapping[str, bytes]) -> Tcb:
    numbers = {name: _number(values[f"{_AMD}.3.{index}"]) for name, index in _TCB.items()}
    fmc = _number(values[_FMC]) if _FMC in values else None
    return Tcb(**numbers, fmc=fmc)


def _number(value: bytes) -> int:
    return int.from_bytes(decode_tlv(value, _INTEGER), signed=True)


def _chip_id(value: bytes) -> bytes:
    # AMD writes the identifier bare; some mirrors of its service wrap it as DER has it.
    if len(value) not in (8, _CHIP_BYTES):
        value = decode_tlv(value, _OCTET_STRING)
    if len(value) not in (8, _CHIP_BYTES):
        raise ValueError(f"a chip identifier of {len(value)} bytes")
    return value.ljust(_CHIP_BYTES, b"\0")


def _provider(value: bytes) -> str:
    return decode_tlv(value, _IA5_STRING).decode("ascii")
