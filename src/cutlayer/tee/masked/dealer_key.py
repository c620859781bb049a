"""The key of a dealer, and the sealed link to it: only it may read seeds, nobody its answers.

Who sees an answer and what the accelerator sees knows the layer's output. X25519 between a fresh
key of this side and two of the dealer's, its own and a fresh one; HKDF-SHA256, one AES-256 key per
direction. Without the dealer's fresh one a recorded connection, played to it once more, would be
answered under the same keys, and whoever steals its own key could read all that was recorded. The
dealer does not learn who asks: it computes for anybody who reaches it.

Source: the pattern NK of Perrin, The Noise Protocol Framework (2018).
"""

from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.storage.files import read_private, write_atomic

__all__ = ["KEY_BYTES", "Asking", "DealerKey"]

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

    def accept(self, asker: bytes) -> tuple[bytes, bytes, bytes]:
        """A fresh public key to send, and the keys of what the dealer then sends and receives.

        Raises:
            ProtocolError: the other side's key is none.
        """
        fresh = X25519PrivateKey.generate()
        own = self._private.public_key().public_bytes_raw()
        told = fresh.public_key().public_bytes_raw()
        try:
            public = X25519PublicKey.from_public_bytes(asker)
            secrets = self._private.exchange(public), fresh.exchange(public)
        except ValueError as error:
            raise ProtocolError("the hello of a sealed link has no usable key") from error
        to_dealer, from_dealer = _derive(secrets, (asker, own, told))
        return told, from_dealer, to_dealer


class Asking:
    """The side of one connection that asks a dealer, with a key pair of its own."""

    def __init__(self, dealer_hex: str, private: bytes) -> None:
        """
        Args:
            dealer_hex: the dealer's own public key.
            private: 32 fresh random bytes, others in each copy of a process.

        Raises:
            ConfigError: the dealer's key is malformed.
        """
        self._private = X25519PrivateKey.from_private_bytes(private)
        try:
            self._dealer = X25519PublicKey.from_public_bytes(bytes.fromhex(dealer_hex))
            self._lasting = self._private.exchange(self._dealer)
        except ValueError as error:
            raise ConfigError(
                "masked.dealer_key is no X25519 key in hex; the dealer prints it when it starts"
            ) from error

    @property
    def public(self) -> bytes:
        """To send."""
        return self._private.public_key().public_bytes_raw()

    def keys(self, told: bytes) -> tuple[bytes, bytes]:
        """Keys of what is sent and received.

        Args:
            told: the dealer's fresh public key; without its own one it cannot use it.

        Raises:
            ProtocolError: it is none.
        """
        try:
            fresh = self._private.exchange(X25519PublicKey.from_public_bytes(told))
        except ValueError as error:
            raise ProtocolError("the dealer's hello has no usable key") from error
        both = self._lasting, fresh
        return _derive(both, (self.public, self._dealer.public_bytes_raw(), told))


def _derive(secrets: tuple[bytes, bytes], publics: tuple[bytes, ...]) -> tuple[bytes, bytes]:
    """Keys to the dealer and from it, for exactly these public keys."""
    derived = HKDF(hashes.SHA256(), 2 * KEY_BYTES, b"".join(publics), _INFO)
    both = derived.derive(b"".join(secrets))
    return both[:KEY_BYTES], both[KEY_BYTES:]
