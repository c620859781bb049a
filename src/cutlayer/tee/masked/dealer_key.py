"""The key of a dealer, and the sealed link to it: only it may read seeds, nobody its answers.

Who sees an answer and what the accelerator sees knows the layer's output. X25519 between a fresh
key of this side and the dealer's own, HKDF-SHA256, one AES-256 key per direction. The dealer does
not learn who asks: it computes for anybody who reaches it.
"""

from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.storage.files import read_private, write_atomic

__all__ = ["KEY_BYTES", "DealerKey", "agree_with"]

KEY_BYTES = 32
_INFO = b"cutlayer masked dealer 1"


class DealerKey:
    """The dealer's own key pair."""

    def __init__(self, private: X25519PrivateKey) -> None:
        """Use `load`."""
        self._private = private

    @classmethod
    def load(cls, path: Path) -> "DealerKey":
        """Read the key, or draw one and keep it there, mode 0600.

        Raises:
            ConfigError: the file is no key.
            StorageError: it cannot be read or written, or others can read it.
        """
        if not path.exists():
            write_atomic(path, X25519PrivateKey.generate().private_bytes_raw())
        try:
            return cls(X25519PrivateKey.from_private_bytes(read_private(path)))
        except ValueError as error:
            raise ConfigError(f"{path} is no dealer key; remove it to draw a new one") from error

    @property
    def public_hex(self) -> str:
        """What `masked.dealer_key` of the other side says."""
        return self._private.public_key().public_bytes_raw().hex()

    def accept(self, ephemeral: bytes) -> tuple[bytes, bytes]:
        """Keys of what the dealer sends and of what it receives.

        Raises:
            ProtocolError: the other side's key is none.
        """
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(ephemeral))
        except ValueError as error:
            raise ProtocolError("the hello of a sealed link has no usable key") from error
        to_dealer, from_dealer = _derive(shared, ephemeral + bytes.fromhex(self.public_hex))
        return from_dealer, to_dealer


def agree_with(dealer_hex: str) -> tuple[bytes, bytes, bytes]:
    """A fresh public key to send, and the keys of what is then sent and received.

    Raises:
        ConfigError: the dealer's key is malformed.
    """
    try:
        public = bytes.fromhex(dealer_hex)
        own = X25519PrivateKey.generate()
        shared = own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ConfigError(
            "masked.dealer_key is no X25519 key in hex; the dealer prints it when it starts"
        ) from error
    ephemeral = own.public_key().public_bytes_raw()
    to_dealer, from_dealer = _derive(shared, ephemeral + public)
    return ephemeral, to_dealer, from_dealer


def _derive(shared: bytes, salt: bytes) -> tuple[bytes, bytes]:
    both = HKDF(hashes.SHA256(), 2 * KEY_BYTES, salt, _INFO).derive(shared)
    return both[:KEY_BYTES], both[KEY_BYTES:]
