"""Whose key seals which owner's saved steps: an owner may have released one of its own.

Released keys live in memory alone. It does not judge who may release (`attestation`).
"""

import threading

from cutlayer.storage.vault import AesVault, Vault

__all__ = ["OwnerVaults", "vault_of"]


class OwnerVaults:
    """The server's own vault, and one for each owner that released a key. Thread-safe."""

    def __init__(self, base: Vault) -> None:
        """`base` seals for all others."""
        self._base = base
        self._own: dict[str, AesVault] = {}
        self._lock = threading.Lock()

    def keep(self, owner: str, key: bytes) -> None:
        """Seal this owner's steps with its key from now on.

        Raises:
            StorageError: a key of another length than 32 bytes.
        """
        vault = AesVault(key)
        with self._lock:
            self._own[owner] = vault

    def of(self, owner: str) -> Vault:
        """What seals and opens this owner's steps."""
        with self._lock:
            return self._own.get(owner, self._base)

    def seal(self, data: bytes, context: str) -> bytes:
        """By the server's own vault."""
        return self._base.seal(data, context)

    def open(self, sealed: bytes, context: str) -> bytes:
        """By the server's own vault."""
        return self._base.open(sealed, context)


def vault_of(vault: Vault, owner: str) -> Vault:
    """The owner's, where there are several."""
    return vault.of(owner) if isinstance(vault, OwnerVaults) else vault
