"""Tokens of NVIDIA's attestation service: JWTs with ES384 under a published key set.

It checks signatures, dates, digests and the chain of the signing key; what the service found is
`verifiers.nvidia`'s to judge. It asks no service.

Source: RFC 7515, RFC 7517; IETF RATS EAT (detached bundle).
"""

import base64
import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cutlayer.tee.certificate_chain import (
    check_chain,
    check_dates,
    fingerprint,
    issuer_key,
    load_certificates,
)
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.untrusted import decode_base64url, decode_untrusted

__all__ = ["ISSUER", "SERVICE_KEY", "GpuClaims", "GpuToken", "ServiceClaims", "verify_tokens"]

ISSUER = "https://nras.attestation.nvidia.com"
"""Every token names it."""
SERVICE_KEY = bytes.fromhex(
    "0390cf59e1e396121e06d242d67df71d18fa2fa5e0790aeec100e3c666696dc1"
    "a08e329dd4abd81efe3bcd332690ee079e"
)
"""Compressed point on P-384 of "NVIDIA Attestation Service CA 001", which key sets do not hold. It
is the one key under which both intermediates of the key sets of 2026-09 and 2026-10 verify
(recovered from their two signatures), and its SHA-1 is the key identifier that both name."""

_COORDINATE_BYTES = 48
_MAX_GPUS = 64


class _Dated(msgspec.Struct, frozen=True, kw_only=True):
    iss: str
    iat: int
    nbf: int
    exp: int
    eat_nonce: str


class ServiceClaims(_Dated, frozen=True, kw_only=True):
    """Of the overall token."""

    submods: dict[str, tuple[str, tuple[str, str]]]
    is_good: bool = msgspec.field(name="x-nvidia-overall-att-result")


class GpuClaims(_Dated, frozen=True, kw_only=True):
    """Of one GPU's token; absent is refused like false."""

    ueid: str
    hwmodel: str = ""
    measres: str = ""
    dbgstat: str = ""
    secboot: bool | None = None
    driver_version: str = msgspec.field(name="x-nvidia-gpu-driver-version", default="")
    vbios_version: str = msgspec.field(name="x-nvidia-gpu-vbios-version", default="")
    is_nonce_match: bool = msgspec.field(
        name="x-nvidia-gpu-attestation-report-nonce-match", default=False
    )
    warning: str | None = msgspec.field(name="x-nvidia-attestation-warning", default=None)


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    alg: str
    kid: str


class _Key(msgspec.Struct, frozen=True, kw_only=True):
    kid: str
    x5c: list[str]


class _KeySet(msgspec.Struct, frozen=True, kw_only=True):
    keys: list[_Key]


class _Bundle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    overall: tuple[str, str]
    parts: dict[str, str]


class _Wrapped(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    own: tuple[str, str]
    parts: dict[str, _Bundle]


T = TypeVar("T")
D = TypeVar("D", bound=_Dated)


@dataclass(frozen=True, kw_only=True)
class GpuToken:
    """The service's word about one GPU."""

    name: str
    claims: GpuClaims


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """Where the signing keys are, and who must vouch for them."""

    by_id: Mapping[str, list[str]]
    roots: Collection[str] | None
    at: datetime


def verify_tokens(
    body: bytes, key_set: bytes, roots: Collection[str] | None, at: datetime
) -> tuple[ServiceClaims, list[GpuToken]]:
    """Check the service's answer.

    Args:
        body: JSON as the service gives it, or as NVIDIA's SDK wraps it (its own token, which has
            no secret key, is passed over).
        key_set: JSON Web Key Set of the time of signing.
        roots: fingerprints that replace the service's authority; None for NVIDIA's.
        at: time of the verdict.

    Raises:
        AttestationError: malformed, bad-signature, bad-chain, wrong-root, dates.
    """
    bundle = _bundle(body)
    parts = bundle.parts
    by_id = {key.kid: key.x5c for key in _decode(key_set, _KeySet, "key set").keys}
    keys = _Keys(by_id=by_id, roots=roots, at=at)
    service = _verify(bundle.overall[1], ServiceClaims, keys)
    if not parts or len(parts) > _MAX_GPUS or set(parts) != set(service.submods):
        raise refused(Refusal.MALFORMED, "the overall token is about other GPUs than the bundle")
    for name, text in parts.items():
        _check_digest(name, text, service.submods[name])
    tokens = [GpuToken(name=n, claims=_verify(parts[n], GpuClaims, keys)) for n in sorted(parts)]
    if any(token.claims.eat_nonce != service.eat_nonce for token in tokens):
        raise refused(Refusal.WRONG_BINDING, "the GPUs' tokens are for different nonces")
    return service, tokens


def _bundle(body: bytes) -> _Bundle:
    if b'"REMOTE_GPU_CLAIMS"' not in body:
        return _decode(body, _Bundle, "token")
    inner = _decode(body, _Wrapped, "token").parts.get("REMOTE_GPU_CLAIMS")
    if inner is None:
        raise refused(Refusal.MALFORMED, "NVIDIA's token: REMOTE_GPU_CLAIMS is elsewhere")
    return inner


def _decode(data: bytes, kind: type[T], what: str) -> T:
    return decode_untrusted(msgspec.json.Decoder(kind).decode, data, f"NVIDIA's {what}")


def _check_digest(name: str, text: str, stated: tuple[str, tuple[str, str]]) -> None:
    kind, (algorithm, digest) = stated
    found = hashlib.sha256(text.encode()).hexdigest()
    if (kind, algorithm) != ("DIGEST", "SHA-256") or not digest.isascii():
        raise refused(Refusal.MALFORMED, f"the overall token names {name} by {kind} {algorithm}")
    if not hmac.compare_digest(found, digest):
        raise refused(Refusal.BAD_SIGNATURE, f"{name} is not the token that the service bundled")


def _verify(text: str, kind: type[D], keys: _Keys) -> D:
    parts = text.split(".")
    if len(parts) != 3:
        raise refused(Refusal.MALFORMED, f"a token has three parts, not {len(parts)}")
    header = _decode(_unbase64(parts[0]), _Header, "token header")
    if header.alg != "ES384":
        raise refused(Refusal.BAD_SIGNATURE, f"a token signed with {header.alg[:20]}, not ES384")
    value = _unbase64(parts[2])
    if len(value) != 2 * _COORDINATE_BYTES:
        raise refused(Refusal.BAD_SIGNATURE, f"a signature of {len(value)} bytes")
    r, s = (int.from_bytes(half) for half in (value[:_COORDINATE_BYTES], value[_COORDINATE_BYTES:]))
    signed = text.rpartition(".")[0].encode()
    try:
        key = _service_key(header.kid, keys)
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise refused(Refusal.BAD_SIGNATURE, "the service's key did not sign this") from None
    claims = _decode(_unbase64(parts[1]), kind, "token")
    _check_claims(claims, keys.at)
    return claims


def _unbase64(text: str) -> bytes:
    try:
        return decode_base64url(text)
    except ValueError as error:
        raise refused(Refusal.MALFORMED, f"a token is no base64: {error}") from error


def _check_claims(claims: _Dated, at: datetime) -> None:
    if claims.iss != ISSUER:
        raise refused(Refusal.WRONG_ROOT, f"a token of {claims.iss[:80]!r}, not of {ISSUER}")
    try:
        begin, end = (datetime.fromtimestamp(t, UTC) for t in (claims.nbf, claims.exp))
        datetime.fromtimestamp(claims.iat, UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise refused(Refusal.MALFORMED, f"a token's date: {error}") from error
    check_dates(begin, end, at, "the service's token")


def _service_key(kid: str, keys: _Keys) -> ec.EllipticCurvePublicKey:
    if kid not in keys.by_id:
        raise refused(
            Refusal.NO_COLLATERAL,
            f"the key set has no key {kid[:100]!r}: keys change daily, keep the set of the day",
        )
    chain: list[x509.Certificate] = []
    for text in keys.by_id[kid]:
        chain += load_certificates(_standard_base64(text), "the service's certificate")
    if not chain:
        raise refused(Refusal.BAD_CHAIN, f"key {kid[:100]!r} has no certificate")
    if keys.roots is None:
        _check_service_chain(chain, keys.at)
    elif fingerprint(chain[-1]) in keys.roots:
        check_chain(chain, at=keys.at, roots=keys.roots, what="the service's chain")
    else:
        raise refused(Refusal.WRONG_ROOT, "the service's chain ends at another root")
    key = issuer_key(chain[0])
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise refused(Refusal.BAD_SIGNATURE, "the service's key is not an elliptic curve's")
    return key


def _standard_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise refused(Refusal.MALFORMED, f"a certificate is no base64: {error}") from error


def _check_service_chain(chain: list[x509.Certificate], at: datetime) -> None:
    """Key, intermediate; the authority above them is known by its key alone."""
    if len(chain) != 2:
        raise refused(Refusal.BAD_CHAIN, f"the service's chain has {len(chain)} certificates")
    leaf, intermediate = chain
    authority = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), SERVICE_KEY)
    # Top first: what is parsed below is then what NVIDIA signed.
    try:
        signed = intermediate.tbs_certificate_bytes
        authority.verify(intermediate.signature, signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise refused(
            Refusal.WRONG_ROOT, "the service's certificate is not NVIDIA's attestation service's"
        ) from None
    is_authority = intermediate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    try:
        leaf.verify_directly_issued_by(intermediate)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise refused(Refusal.BAD_CHAIN, "the service's key is not certified") from error
    if not is_authority:
        raise refused(Refusal.BAD_CHAIN, "the service's intermediate is no authority")
    for one in chain:
        check_dates(one.not_valid_before_utc, one.not_valid_after_utc, at, "the service's chain")
