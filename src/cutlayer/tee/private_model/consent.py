"""An owner's signed word that somebody may take private weights or adapters out: until when.

One JSON file per consent: what was said, and a signature over its canonical form by the owner's
Ed25519 or ECDSA key. Who checks it holds the plain weights; who has them already needs no consent.
"""

import base64
import binascii
import secrets
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from cutlayer.canonical import canonical_json
from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.storage.files import explain_os_errors, read_private, write_atomic
from cutlayer.tee.private_model.label import What

__all__ = [
    "Consent",
    "OwnerKey",
    "check_consent",
    "give_consent",
    "new_owner_key",
    "read_consent",
    "require_consent",
]

_Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
_Public = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey

_LABEL = b"cutlayer export consent 1\0"
_CURVES = ("secp256r1", "secp384r1")
_MAX_BYTES = 64 << 10


class Consent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner said."""

    format: int = 1
    model: str
    """Digest of the model, hex, as both sides print it."""
    what: What
    to: str
    """Name in the certificate of whoever may take it out."""
    until: datetime
    """Not after; with time zone."""
    serial: str
    """16 random bytes, hex, for the owner's book."""

    def signed_bytes(self) -> bytes:
        """The canonical form, under a label of its own."""
        return _LABEL + canonical_json(msgspec.to_builtins(self))


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    consent: Consent
    signature: str


class OwnerKey:
    """An owner's public key."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: PEM; Ed25519, or ECDSA on P-256 or P-384.

        Raises:
            ConfigError: it cannot be read, or is of another kind.
        """
        self.path = path
        try:
            key = load_pem_public_key(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the owner's key {path}: {error.strerror}") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path} is no public key in PEM form") from error
        self._key = _check_kind(key, path)

    def has_signed(self, data: bytes, signature: bytes) -> bool:
        """Whether the signature over `data` is the owner's."""
        try:
            if isinstance(self._key, ed25519.Ed25519PublicKey):
                self._key.verify(signature, data)
            else:
                self._key.verify(signature, data, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True


def new_owner_key(path: Path) -> Path:
    """Write an Ed25519 key (mode 0600) and its public half beside it, which is returned.

    Raises:
        StorageError: a file exists or cannot be written.
    """
    public = path.with_suffix(".pub.pem")
    for target in (path, public):
        if target.exists():
            raise StorageError(f"{target} exists and a key is never overwritten; move it away")
    key = ed25519.Ed25519PrivateKey.generate()
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_atomic(public, pem, mode=0o644)
    return public


def give_consent(owner: Path, model: str, what: What, to: str, until: datetime) -> bytes:
    """A consent file.

    Args:
        owner: PEM of the owner's private key, mode 0600.
        model: its digest, hex.
        what: weights or adapter.
        to: the receiver's certificate name.
        until: not after, UTC with time zone.

    Raises:
        StorageError: the key cannot be read.
        ConfigError: it is no Ed25519 or ECDSA key, or `until` has no time zone.
    """
    if until.tzinfo is None:
        raise ConfigError(f"until {until.isoformat()} has no time zone; end it with Z or +00:00")
    consent = Consent(model=model, what=what, to=to, until=until, serial=secrets.token_hex(16))
    key = _load_private(owner)
    data = consent.signed_bytes()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(data)
    else:
        signature = key.sign(data, ec.ECDSA(SHA256()))
    file = _File(consent=consent, signature=base64.b64encode(signature).decode())
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"


def read_consent(path: Path, owner: OwnerKey) -> Consent:
    """What a file says, if it is the owner's.

    Args:
        path: the consent.
        owner: whose it must be.

    Raises:
        PermissionRefused: malformed, or not signed by this owner.
    """
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(_MAX_BYTES), type=_File)
        signature = base64.b64decode(found.signature, validate=True)
    except OSError as error:
        raise PermissionRefused(f"cannot read the consent {path}: {error.strerror}") from error
    except (msgspec.DecodeError, binascii.Error, UnicodeError, RecursionError) as error:
        raise PermissionRefused(f"{path} is no consent: {error}") from error
    if found.consent.format != 1 or found.consent.until.tzinfo is None:
        raise PermissionRefused(f"{path} is a consent of another format, or without time zone")
    if not owner.has_signed(found.consent.signed_bytes(), signature):
        raise PermissionRefused(
            f"{path} is not signed by the owner in {owner.path}, or was changed afterwards"
        )
    return found.consent


def check_consent(consent: Consent, model: str, what: What, to: str, at: datetime) -> None:
    """Refuse a consent that does not cover an export.

    Args:
        consent: the owner's.
        model: digest of what would be taken out, hex.
        what: weights or adapter.
        to: who would take it.
        at: when, UTC with time zone.

    Raises:
        PermissionRefused: it is for something else, for somebody else, or has run out.
    """
    pairs = (("model", consent.model, model), ("what", consent.what, what), ("to", consent.to, to))
    for name, said, wanted in pairs:
        if said != wanted:
            raise PermissionRefused(f"the consent's {name} is {said}, the export's {wanted}")
    if at > consent.until:
        raise PermissionRefused(f"the consent ended {consent.until.isoformat()}; ask the owner")


def require_consent(
    folder: Path, owner: OwnerKey, model: str, what: What, to: str, at: datetime
) -> Consent:
    """The consent for an export, out of all in a folder (`*.json`).

    Raises:
        PermissionRefused: none covers it; says why of each, up to three.
        StorageError: the folder cannot be read.
    """
    reasons = []
    with explain_os_errors(f"read {folder}"):
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    for path in paths:
        try:
            consent = read_consent(path, owner)
            check_consent(consent, model, what, to, at)
        except PermissionRefused as error:
            reasons.append(f"{path.name}: {error}")
        else:
            return consent
    why = "; ".join(reasons[:3]) or "there is none"
    raise PermissionRefused(
        f"the {what} of model {model[:12]} is private and {to} has no consent of its owner ({why})"
    )


def _load_private(path: Path) -> _Private:
    data = read_private(path)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no private key in PEM form without passphrase") from error
    _check_kind(key.public_key(), path)
    assert isinstance(key, _Private)
    return key


def _check_kind(key: object, path: Path) -> _Public:
    is_known_curve = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    if not (is_known_curve or isinstance(key, ed25519.Ed25519PublicKey)):
        raise ConfigError(f"{path} must be an Ed25519 key, or ECDSA on P-256 or P-384")
    assert isinstance(key, _Public)
    return key
