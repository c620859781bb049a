"""Public areas of TPM keys: the key, its name, and what the TPM promises about its use.

It checks no signature and believes no key. Source: TCG, TPM Library part 2, TPMT_PUBLIC; part 1,
"Names" (a name is the hash of the public area, so the attributes are part of it).
"""

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.tpm_attest import TpmKey
from cutlayer.tee.tpm_reader import TpmReader

__all__ = ["TpmPublic", "key_digest", "parse_public"]

_ALG_RSA, _ALG_ECC, _ALG_NULL = 0x0001, 0x0023, 0x0010
_ALG_ECDAA = 0x001A
_ALG_RSAES = 0x0015
_NAME_HASHES = {0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_CURVES: dict[int, type[ec.EllipticCurve]] = {
    0x0003: ec.SECP256R1,
    0x0004: ec.SECP384R1,
    0x0005: ec.SECP521R1,
}
_FIXED_TPM, _FIXED_PARENT, _ORIGIN = 1 << 1, 1 << 4, 1 << 5
_RESTRICTED, _DECRYPT, _SIGN = 1 << 16, 1 << 17, 1 << 18
_ATTESTATION = _FIXED_TPM | _FIXED_PARENT | _ORIGIN | _RESTRICTED | _SIGN
_DEFAULT_EXPONENT = 65537


@dataclass(frozen=True, kw_only=True)
class TpmPublic:
    """TPMT_PUBLIC of an RSA or elliptic-curve key."""

    key: TpmKey
    name: bytes
    """Hash algorithm and hash of the public area."""
    hash_name: str
    """Of the name, and of the key's derivations."""
    attributes: int
    """TPMA_OBJECT."""
    symmetric_bits: int
    """AES-CFB with which a storage key protects its children; 0 where it is none."""

    @property
    def is_attestation_key(self) -> bool:
        """Born in the TPM, cannot leave it, and signs nothing but what the TPM itself made."""
        return self.attributes & (_ATTESTATION | _DECRYPT) == _ATTESTATION

    @property
    def is_storage_key(self) -> bool:
        """Born in the TPM, cannot leave it, and decrypts nothing but what the TPM interprets."""
        wanted = _FIXED_TPM | _FIXED_PARENT | _ORIGIN | _RESTRICTED | _DECRYPT
        return self.attributes & (wanted | _SIGN) == wanted


def parse_public(data: bytes) -> TpmPublic:
    """Read TPMT_PUBLIC or TPM2B_PUBLIC.

    Raises:
        AttestationError: malformed, or a key of another kind.
    """
    area = data[2:] if int.from_bytes(data[:2], "big") == len(data) - 2 else data
    reader = TpmReader(area, "TPMT_PUBLIC")
    kind = reader.u16()
    hash_id = reader.u16()
    if hash_id not in _NAME_HASHES:
        raise refused(Refusal.MALFORMED, f"a key named by hash {hash_id:#06x}")
    hash_name = _NAME_HASHES[hash_id]
    attributes = reader.u32()
    reader.sized()
    symmetric_bits = _read_symmetric(reader)
    key = _read_key(reader, kind)
    reader.finish()
    return TpmPublic(
        key=key,
        name=hash_id.to_bytes(2, "big") + hashlib.new(hash_name, area).digest(),
        hash_name=hash_name,
        attributes=attributes,
        symmetric_bits=symmetric_bits,
    )


def _read_symmetric(reader: TpmReader) -> int:
    if reader.u16() == _ALG_NULL:
        return 0
    num_bits = reader.u16()
    reader.u16()
    return num_bits


def _skip_scheme(reader: TpmReader) -> None:
    algorithm = reader.u16()
    if algorithm in (_ALG_NULL, _ALG_RSAES):
        return
    reader.u16()
    if algorithm == _ALG_ECDAA:
        reader.u16()


def _read_key(reader: TpmReader, kind: int) -> TpmKey:
    _skip_scheme(reader)
    try:
        if kind == _ALG_RSA:
            return _read_rsa(reader)
        if kind == _ALG_ECC:
            return _read_ec(reader)
    except ValueError as error:
        raise refused(Refusal.MALFORMED, f"the TPM's key is none: {error}") from error
    raise refused(Refusal.MALFORMED, f"a TPM key of kind {kind:#06x}; RSA or ECC is expected")


def _read_rsa(reader: TpmReader) -> rsa.RSAPublicKey:
    reader.u16()
    exponent = reader.u32() or _DEFAULT_EXPONENT
    modulus = int.from_bytes(reader.sized(), "big")
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


def _read_ec(reader: TpmReader) -> ec.EllipticCurvePublicKey:
    curve = reader.u16()
    if curve not in _CURVES:
        raise refused(Refusal.MALFORMED, f"a TPM key on curve {curve:#06x}")
    if reader.u16() != _ALG_NULL:
        reader.u16()
    x, y = (int.from_bytes(reader.sized(), "big") for _ in range(2))
    return ec.EllipticCurvePublicNumbers(x, y, _CURVES[curve]()).public_key()


def key_digest(key: TpmKey) -> str:
    """SHA-256 of the DER SubjectPublicKeyInfo, in hex: the measurement `ak_sha256`."""
    return hashlib.sha256(
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()
