"""TPM 2.0 quotes: who signed, which nonce, which PCRs, and whether the PCR values are those.

It parses what the TPM signed and checks it under a given key. Whether that key is a TPM's is
`verifiers.tpm` and `tpm_activation`; whether the PCRs are right is the policy's.

Source: TCG, Trusted Platform Module Library part 2 (structures), revision 1.59.
"""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.tpm_reader import TpmReader

__all__ = [
    "HASHES",
    "Quote",
    "TpmKey",
    "TpmSignature",
    "check_signature",
    "parse_quote",
    "parse_signature",
    "pcr_measurements",
    "verify_quote",
]

TpmKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
"""What an attestation key can be."""

HASHES: Mapping[str, Callable[[], hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
"""SHA-1 is left out on purpose: neither signatures nor PCR banks of it count."""

_HASH_NAMES = {0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_SCHEMES = {0x0014: "rsassa", 0x0016: "rsapss", 0x0018: "ecdsa"}
_MAGIC = 0xFF544347
_ATTEST_QUOTE = 0x8018
_MAX_BANKS = 16
_MAX_SELECT_BYTES = 4
_RSA_BITS = range(2048, 8193)
_EC_BITS = range(256, 522)


@dataclass(frozen=True, kw_only=True)
class TpmSignature:
    """TPMT_SIGNATURE."""

    scheme: str
    """rsassa, rsapss or ecdsa."""
    hash_name: str
    """Key of `HASHES`; the digest over the PCRs uses the same."""
    value: bytes
    """RSA: the number, big-endian. ECDSA: r and s in DER."""


@dataclass(frozen=True, kw_only=True)
class Quote:
    """TPMS_ATTEST of type quote."""

    qualified_signer: bytes
    """Name of the attestation key in its hierarchy."""
    nonce: bytes
    """`extraData`: what the verifier asked the TPM to bind."""
    clock_ms: int
    """Time that the TPM has been powered, over its life."""
    reset_count: int
    restart_count: int
    is_clock_safe: bool
    firmware_version: int
    selections: tuple[tuple[str, tuple[int, ...]], ...]
    """(bank, PCR indices) in the order of the digest."""
    pcr_digest: bytes


def parse_quote(message: bytes) -> Quote:
    """Read TPMS_ATTEST; nothing of it is believed before its signature is checked.

    Raises:
        AttestationError: malformed, or no quote.
    """
    reader = TpmReader(message, "TPMS_ATTEST")
    if reader.u32() != _MAGIC:
        raise refused(Refusal.MALFORMED, "no TPM made this quote: its first bytes are other ones")
    kind = reader.u16()
    if kind != _ATTEST_QUOTE:
        raise refused(Refusal.MALFORMED, f"the TPM signed a structure of type {kind:#x}, no quote")
    quote = Quote(
        qualified_signer=reader.sized(),
        nonce=reader.sized(),
        clock_ms=reader.u64(),
        reset_count=reader.u32(),
        restart_count=reader.u32(),
        is_clock_safe=reader.u8() == 1,
        firmware_version=reader.u64(),
        selections=_read_selections(reader),
        pcr_digest=reader.sized(),
    )
    reader.finish()
    return quote


def _read_selections(reader: TpmReader) -> tuple[tuple[str, tuple[int, ...]], ...]:
    num_banks = reader.u32()
    if num_banks > _MAX_BANKS:
        raise refused(Refusal.MALFORMED, f"the quote selects {num_banks} PCR banks")
    found = []
    for _ in range(num_banks):
        bank = _hash_name(reader.u16(), "PCR bank")
        size = reader.u8()
        if size > _MAX_SELECT_BYTES:
            raise refused(Refusal.MALFORMED, f"a PCR selection of {size} bytes")
        bits = int.from_bytes(reader.take(size), "little")
        found.append((bank, tuple(i for i in range(8 * size) if bits >> i & 1)))
    return tuple(found)


def _hash_name(algorithm: int, what: str) -> str:
    try:
        return _HASH_NAMES[algorithm]
    except KeyError:
        raise refused(
            Refusal.MALFORMED,
            f"{what} {algorithm:#06x} is not accepted; use sha256, sha384 or sha512",
        ) from None


def parse_signature(data: bytes) -> TpmSignature:
    """Read TPMT_SIGNATURE.

    Raises:
        AttestationError: malformed, or a scheme that is not accepted.
    """
    reader = TpmReader(data, "TPMT_SIGNATURE")
    algorithm = reader.u16()
    if algorithm not in _SCHEMES:
        raise refused(Refusal.MALFORMED, f"signature scheme {algorithm:#06x} is not accepted")
    scheme = _SCHEMES[algorithm]
    hash_name = _hash_name(reader.u16(), "signature hash")
    value = reader.sized()
    if scheme == "ecdsa":
        r, s = int.from_bytes(value, "big"), int.from_bytes(reader.sized(), "big")
        value = encode_dss_signature(r, s)
    reader.finish()
    return TpmSignature(scheme=scheme, hash_name=hash_name, value=value)


def check_signature(message: bytes, signature: TpmSignature, key: TpmKey) -> None:
    """Refuse a message that the key did not sign.

    Raises:
        AttestationError: another key or message; a key of another kind, or a weak one.
    """
    algorithm = HASHES[signature.hash_name]()
    try:
        if isinstance(key, rsa.RSAPublicKey) and signature.scheme in ("rsassa", "rsapss"):
            _check_size(key.key_size, _RSA_BITS)
            key.verify(signature.value, message, _padding(signature.scheme, algorithm), algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey) and signature.scheme == "ecdsa":
            _check_size(key.key_size, _EC_BITS)
            key.verify(signature.value, message, ec.ECDSA(algorithm))
        else:
            raise refused(Refusal.BAD_SIGNATURE, f"{signature.scheme} under a key of another kind")
    except InvalidSignature:
        raise refused(Refusal.BAD_SIGNATURE, "the attestation key did not sign this") from None


def _check_size(num_bits: int, accepted: range) -> None:
    if num_bits not in accepted:
        raise refused(
            Refusal.BAD_SIGNATURE,
            f"a key of {num_bits} bits; accepted: {accepted.start} to {accepted[-1]}",
        )


def _padding(scheme: str, algorithm: hashes.HashAlgorithm) -> padding.AsymmetricPadding:
    if scheme == "rsassa":
        return padding.PKCS1v15()
    # TPMs differ in the salt's length: the digest's, or all that fits.
    return padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)


def verify_quote(
    message: bytes,
    signature: TpmSignature,
    key: TpmKey,
    pcrs: Mapping[str, Mapping[int, bytes]],
) -> Quote:
    """Check a quote under a key, and that these are the PCR values that it is about.

    Args:
        message: TPMS_ATTEST as it was signed.
        signature: over it.
        key: the attestation key, which the caller has reason to believe.
        pcrs: values by bank ("sha256") and index; what the quote does not select is not used.

    Raises:
        AttestationError: another signer, other PCR values, malformed.
    """
    check_signature(message, signature, key)
    quote = parse_quote(message)
    digest = hashes.Hash(HASHES[signature.hash_name]())
    for bank, index, value in _selected(quote, pcrs):
        if len(value) != HASHES[bank]().digest_size:
            raise refused(Refusal.MALFORMED, f"PCR {index} of {bank} has {len(value)} bytes")
        digest.update(value)
    if not hmac.compare_digest(digest.finalize(), quote.pcr_digest):
        raise refused(
            Refusal.BAD_SIGNATURE, "the PCR values beside the quote are not those that it signs"
        )
    return quote


def _selected(
    quote: Quote, pcrs: Mapping[str, Mapping[int, bytes]]
) -> list[tuple[str, int, bytes]]:
    """(bank, index, value) in the order of the digest."""
    found = []
    for bank, indices in quote.selections:
        for index in indices:
            value = pcrs.get(bank, {}).get(index)
            if value is None:
                raise refused(Refusal.NO_COLLATERAL, f"the value of PCR {index} ({bank}) is absent")
            found.append((bank, index, value))
    return found


def pcr_measurements(quote: Quote, pcrs: Mapping[str, Mapping[int, bytes]]) -> dict[str, str]:
    """The quoted values under the names that policies use: `pcr4`, or `pcr4_sha384`.

    Args:
        quote: verified with the same `pcrs`.
        pcrs: values by bank and index.
    """
    return {
        f"pcr{index}" if bank == "sha256" else f"pcr{index}_{bank}": value.hex()
        for bank, index, value in _selected(quote, pcrs)
    }
