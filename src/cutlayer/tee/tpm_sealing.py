"""A secret that this machine's TPM gives back only while it has booted the same.

It seals keys, not files: what is larger is encrypted under a sealed key. Roll forward by unsealing
before an update and sealing again after it.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError
from cutlayer.storage.files import read_private, write_atomic
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.tpm_device import TpmDevice, TpmFiles

__all__ = ["SealedSecret", "read_sealed", "seal", "unseal", "write_sealed"]

_MAX_SECRET_BYTES = 128
_POLICY_FAILED = "(0x0000099d)"


class SealedSecret(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ciphertext; only the TPM that made it reads it."""

    pcrs: tuple[int, ...]
    public: bytes
    private: bytes


def seal(device: TpmDevice, secret: bytes, pcrs: Sequence[int]) -> SealedSecret:
    """Seal to the present values of PCRs.

    Args:
        device: this machine's TPM.
        secret: 1 to 128 bytes.
        pcrs: indices in the SHA-256 bank.

    Raises:
        ConfigError: too long a secret, no PCR, or the TPM refused.
    """
    if not 0 < len(secret) <= _MAX_SECRET_BYTES:
        raise ConfigError(
            f"a TPM seals 1 to {_MAX_SECRET_BYTES} bytes, not {len(secret)}; seal a key, and "
            "encrypt the rest with it"
        )
    if not pcrs or not all(0 <= index < 24 for index in pcrs):
        raise ConfigError(f"cannot seal to the PCRs {list(pcrs)}; name some of 0 to 23")
    files = device.seal(secret, pcrs)
    return SealedSecret(pcrs=tuple(pcrs), public=files.public, private=files.private)


def unseal(device: TpmDevice, sealed: SealedSecret) -> bytes:
    """The secret.

    Raises:
        AttestationError: wrong-measurement; the machine is in another state.
        ConfigError: another TPM's, or the TPM does not answer.
    """
    try:
        files = TpmFiles(public=sealed.public, private=sealed.private)
        return device.unseal(files, sealed.pcrs)
    except ConfigError as error:
        if _POLICY_FAILED in str(error):
            raise refused(
                Refusal.WRONG_MEASUREMENT,
                f"PCRs {list(sealed.pcrs)} are not as they were when this was sealed: other "
                "firmware, kernel or settings were booted",
            ) from error
        raise


def write_sealed(path: Path, sealed: SealedSecret) -> None:
    """Keep it as a file of mode 0600.

    Raises:
        StorageError: it cannot be written.
    """
    write_atomic(path, msgspec.json.encode(sealed))


def read_sealed(path: Path) -> SealedSecret:
    """What `write_sealed` wrote.

    Raises:
        StorageError: it cannot be read.
        ConfigError: something else stands there.
    """
    try:
        return msgspec.json.decode(read_private(path), type=SealedSecret)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} holds no sealed secret: {error}") from error
