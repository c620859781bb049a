"""Private keys and fingerprints.

It does not know certificates. A private key is read from a file of mode 0600, written once, and
never sent, printed or logged.
"""

import hashlib
import hmac
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import Certificate

from cutlayer.errors import ConfigError, StorageError
from cutlayer.storage.files import read_private, write_atomic

__all__ = [
    "PrivateKey",
    "PublicKey",
    "certificate_fingerprint",
    "check_key",
    "is_same_fingerprint",
    "key_fingerprint",
    "load_key",
    "new_key",
    "save_key",
]

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_CURVES = ("secp256r1", "secp384r1")
_MIN_RSA_BITS = 2048
_SEPARATORS = re.compile(r"[\s:.-]+")


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh ECDSA key on P-256, which every TLS library accepts."""
    return ec.generate_private_key(ec.SECP256R1())


def save_key(path: Path, key: PrivateKey, passphrase: bytes | None = None) -> None:
    """Write a key as PKCS #8 PEM, mode 0600, encrypted if there is a passphrase.

    Raises:
        StorageError: the file exists (a key is never overwritten) or cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path} exists and a key is never overwritten; move it away first")
    write_atomic(
        path,
        key.private_bytes(
            Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase)
            if passphrase
            else serialization.NoEncryption(),
        ),
    )


def load_key(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Read a private key.

    Raises:
        StorageError: missing, open to others, malformed, or the passphrase is wrong or missing.
        ConfigError: a kind of key that TLS peers may not accept.
    """
    data = read_private(path)
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except TypeError as error:
        needs = "takes no passphrase" if passphrase else "is encrypted; give its passphrase"
        raise StorageError(f"private key {path} {needs}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = "the passphrase is wrong, or it" if passphrase else "it"
        raise StorageError(f"cannot read private key {path}: {hint} is not a PEM key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ConfigError(f"{path} must be an ECDSA or RSA key")
    check_key(key.public_key(), str(path))
    return key


def check_key(key: object, where: str) -> PublicKey:
    """Refuse keys that are weak or that TLS peers may not accept.

    Raises:
        ConfigError: not ECDSA on P-256 or P-384, nor RSA of at least 2048 bits.
    """
    is_good_curve = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES
    is_good_rsa = isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS
    if not (is_good_curve or is_good_rsa):
        raise ConfigError(
            f"{where} has a key of another kind; use ECDSA on P-256 or P-384, or RSA with at "
            f"least {_MIN_RSA_BITS} bits"
        )
    assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    return key


def key_fingerprint(key: PublicKey) -> str:
    """SHA-256 of the public key (SubjectPublicKeyInfo, DER), for comparison by people."""
    return _grouped(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def certificate_fingerprint(certificate: Certificate) -> str:
    """SHA-256 of the whole certificate (DER), for comparison by people."""
    return _grouped(certificate.public_bytes(Encoding.DER))


def is_same_fingerprint(first: str, second: str) -> bool:
    """Compare in constant time; spaces, colons and case do not matter, the length does."""
    one, two = (_SEPARATORS.sub("", text).lower().encode() for text in (first, second))
    return hmac.compare_digest(one, two)


def _grouped(data: bytes) -> str:
    digits = hashlib.sha256(data).hexdigest()
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))
