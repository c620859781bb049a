"""The owner's keys, given to places whose evidence is what the policy names, and to no others.

It opens no connection: `challenge` and `release` are what a service, or two files, carry. What was
released cannot be called back; it ends with the process that got it, or is opened until it expires.
"""

import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.storage.files import private_folder, read_private, write_atomic
from cutlayer.storage.vault import key_from_hex
from cutlayer.tee.challenge import Challenger
from cutlayer.tee.exhibit import Side
from cutlayer.tee.key_release import Accepted, release
from cutlayer.tee.policy import Policy
from cutlayer.tee.private_model.label import Label, key_id_of
from cutlayer.tee.process.secret import SecretBytes
from cutlayer.tee.verifier import utc_now

__all__ = ["NO_CHANNEL", "KeyFolder", "KeyHolder", "terms"]

NO_CHANNEL = bytes(32)
"""Stands for the TLS key where evidence is asked for outside of a connection."""
_KEY_BYTES = 32


def terms(label: Label) -> Mapping[str, str | int]:
    """What evidence for this label's key is bound to, beside the nonce and the place's key."""
    return {"job": label.job}


class KeyFolder:
    """One file per key, named by its label's digest, mode 0600; only the owner has it."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            StorageError: others may enter the folder.
        """
        self._folder = private_folder(folder)

    def new_key(self) -> bytes:
        """A fresh key, which is nowhere until it is kept."""
        return secrets.token_bytes(_KEY_BYTES)

    def keep(self, label: Label, key: bytes) -> Path:
        """Write a key; without it nothing that it sealed can be read again.

        Raises:
            StorageError: it cannot be written.
        """
        path = self._path(label)
        write_atomic(path, key.hex().encode() + b"\n")
        return path

    def load(self, label: Label) -> SecretBytes:
        """The key of a label, in hidden pages.

        Raises:
            StorageError: missing, open to others, or not this label's.
        """
        path = self._path(label)
        try:
            key = key_from_hex(read_private(path))
        except ValueError as error:
            raise StorageError(f"{path} holds no key; restore it from a copy") from error
        if key_id_of(bytes(key)) != label.key_id:
            raise StorageError(f"{path} is not the key {label.key_id} of this label")
        return SecretBytes.take(key)

    def _path(self, label: Label) -> Path:
        return self._folder / f"{label.digest}.key"


class KeyHolder:
    """Challenges a place and, if the policy accepts its evidence, seals a key to it."""

    def __init__(
        self,
        keys: KeyFolder,
        policy: Policy,
        lifetime_s: float = 300.0,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """
        Args:
            keys: the owner's.
            policy: which places may have them; it must name their measurement.
            lifetime_s: how long a released key may be opened.
            now: time of each verdict, UTC.

        Raises:
            ConfigError: the policy names no measurement, so any software would get the keys.
        """
        if not policy.measurements:
            raise ConfigError(
                f"policy {policy.name} names no measurement, so any software would get the keys; "
                "add reference values with `cutlayer attest policy init`"
            )
        self._keys, self._now = keys, now
        self._lifetime = timedelta(seconds=lifetime_s)
        self._challenger = Challenger(policy, Side.SERVER, now)

    def challenge(self) -> bytes:
        """A nonce for one answer."""
        return self._challenger.draw()

    def release(self, label: Label, proof: bytes, nonce: bytes) -> bytes:
        """The label's key, sealed to the place that made this proof.

        Args:
            label: of what the place wants to open.
            proof: from the place's `Prover`, over `NO_CHANNEL` and `terms(label)`.
            nonce: from `challenge`.

        Raises:
            AttestationError: the evidence is refused; `refusal` names the reason.
            StorageError: the key cannot be read.
        """
        place = self._challenger.judge(proof, nonce, NO_CHANNEL, terms(label))
        return self.release_to(label, place)

    def release_to(self, label: Label, place: Accepted) -> bytes:
        """The same for a place that was accepted on a connection of one's own.

        Raises:
            PermissionRefused: it was accepted under another policy.
            StorageError: the key cannot be read.
        """
        if place.result.policy_digest != self._challenger.policy.digest:
            raise PermissionRefused(
                f"the place was accepted by policy {place.result.policy}, the keys want "
                f"{self._challenger.policy.name}"
            )
        expires_at = self._now() + self._lifetime
        with self._keys.load(label) as key, key.view() as view:
            return release(bytes(view), place, label.job, expires_at)
