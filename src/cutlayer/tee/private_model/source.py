"""Where a server's weights come from if they are private, and who may take its adapters out.

It serves nothing: `open_model` and `ExportGate` are what a server calls.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pydantic import Field

from cutlayer.errors import ConfigError
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.settings import Settings
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.challenge import Prover
from cutlayer.tee.exhibit import Side
from cutlayer.tee.private_model.consent import OwnerKey, require_consent
from cutlayer.tee.private_model.exchange import receive
from cutlayer.tee.private_model.label import What, is_sealed, read_label
from cutlayer.tee.private_model.sealed_part import SealedFolder
from cutlayer.tee.verifier import utc_now

__all__ = ["ExportGate", "PrivateModelSettings", "open_model"]


class PrivateModelSettings(Settings):
    """What the owner of the model keeps in hand; docs/private-models.md."""

    owner: Path | None = None
    """The owner's public key, PEM: adapters leave only with a consent that it signed. None lets
    every client take its own."""
    consents: Path = Path("consents")
    """Folder of consents, `*.json`; a new file counts at once."""
    exchange: Path | None = None
    """Folder shared with the owner, through which the key of sealed weights comes at the start."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Seconds to wait for the owner there."""


def open_model(
    name: str,
    revision: str | None,
    private: PrivateModelSettings | None,
    attester: AttesterSettings | None,
    is_masked: bool,
) -> ModelFolder:
    """A model by its name, or a sealed part whose key the owner releases to this place.

    Args:
        name: folder, sealed folder, GGUF file or hub id.
        revision: of a hub id.
        private: where the owner's key comes from.
        attester: makes this place's evidence.
        is_masked: frozen layers go to an accelerator, which then has their weights.

    Raises:
        ConfigError: it is sealed, and it is not said how its key comes or what attests this place,
            or it would be shown to an accelerator; or it is not, and a key is waited for.
        AttestationError: the key is for another place.
        TransportError: the owner did not answer in time, or refused.
        ModelError, StorageError: it cannot be read.
    """
    exchange = None if private is None else private.exchange
    if not is_sealed(name):
        if exchange is not None:
            # Whoever can write to the disk may have put other weights there.
            raise ConfigError(
                f"private_model.exchange waits for the key of sealed weights and {name} is not "
                "sealed: name the sealed folder, or remove the setting"
            )
        return resolve_model(name, revision)
    folder = Path(name).expanduser()
    if is_masked:
        # The operator writes the settings; the owner released the key to keep it from him.
        raise ConfigError(
            f"{folder} is sealed, and [masked] would give its weights to an accelerator in the "
            "clear; remove one of them (docs/private-models.md)"
        )
    label = read_label(folder)
    if private is None or exchange is None:
        raise ConfigError(
            f"{folder} is sealed (key {label.key_id}); set private_model.exchange to a folder "
            "that its owner reaches too"
        )
    if attester is None:
        raise ConfigError(
            f"{folder} is sealed and its key goes to attested places alone; say in the section "
            "[tee] what attests this one"
        )
    prover = Prover(attester, Side.SERVER)
    with receive(label, prover, exchange, private.timeout_s) as key, key.view() as view:
        return SealedFolder(folder, bytes(view))


class ExportGate:
    """Asked before private weights or adapters leave; without an owner it is open."""

    def __init__(
        self, settings: PrivateModelSettings | None, now: Callable[[], datetime] = utc_now
    ) -> None:
        """Read the owner's key.

        Raises:
            ConfigError: it cannot be read.
        """
        self._settings, self._now = settings, now
        owner = None if settings is None else settings.owner
        self._owner = None if owner is None else OwnerKey(owner)

    def require(self, model: str, what: What, to: str) -> None:
        """Refuse what the owner did not consent to.

        Args:
            model: its digest, hex.
            what: is to leave.
            to: whom it goes to, by certificate.

        Raises:
            PermissionRefused: no consent covers it; says why of each.
            StorageError: the consents cannot be read.
        """
        if self._settings is not None and self._owner is not None:
            folder = self._settings.consents
            require_consent(folder, self._owner, model, what, to, self._now())
