"""A key's way to a place through a folder that both sides can reach: challenge, proof, sealed key.

Nothing secret lies there: the key is sealed to the place, the proof is evidence for one nonce. Who
can write to the folder can disturb an exchange, not win one.
"""

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cutlayer.errors import TransportError
from cutlayer.storage.files import explain_os_errors, write_atomic
from cutlayer.tee.challenge import Prover
from cutlayer.tee.exhibit import MAX_PROOF_BYTES, Side
from cutlayer.tee.private_model.key_holder import NO_CHANNEL, KeyHolder, terms
from cutlayer.tee.private_model.label import Label
from cutlayer.tee.process.secret import SecretBytes
from cutlayer.tee.verifier import utc_now

__all__ = ["hand_out", "receive"]

_CHALLENGE, _PROOF, _KEY = "challenge", "proof", "key"
_PAUSE_S = 0.05


def hand_out(holder: KeyHolder, label: Label, folder: Path, timeout_s: float) -> None:
    """The owner's side: challenge whoever reads the folder, and seal the key to an accepted place.

    Args:
        holder: of the key.
        label: of what is sealed.
        folder: shared with the place; what an earlier exchange left there is removed.
        timeout_s: to wait for the proof.

    Raises:
        AttestationError: the proof is refused; `refusal` names the reason.
        TransportError: none came in time.
        StorageError: the folder or the key cannot be used.
    """
    with explain_os_errors(f"use {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (_CHALLENGE, _PROOF, _KEY):
            (folder / name).unlink(missing_ok=True)
    nonce = holder.challenge()
    write_atomic(folder / _CHALLENGE, nonce, mode=0o644)
    proof = _wait_for(folder / _PROOF, timeout_s, lambda: False)
    write_atomic(folder / _KEY, holder.release(label, proof, nonce), mode=0o644)


def receive(
    label: Label,
    prover: Prover,
    folder: Path,
    timeout_s: float,
    now: Callable[[], datetime] = utc_now,
) -> SecretBytes:
    """The place's side: answer the challenge and open the key, into hidden pages.

    Args:
        label: of what is to be opened.
        prover: makes this place's evidence, for the side `server`.
        folder: shared with the owner.
        timeout_s: to wait for each of the owner's files.
        now: the time, UTC.

    Raises:
        AttestationError: the key is for another place or job, or has expired.
        TransportError: the owner did not answer in time, or refused.
        ConfigError: this machine makes no such evidence.
    """
    nonce = _wait_for(folder / _CHALLENGE, timeout_s, lambda: False)
    proof = prover.prove(nonce, NO_CHANNEL, terms(label))
    write_atomic(folder / _PROOF, proof, mode=0o644)
    sealed = _wait_for(folder / _KEY, timeout_s, lambda: _read(folder / _CHALLENGE) != nonce)
    key = prover.sealing_key.open(sealed, Side.SERVER, label.job, now())
    return SecretBytes.take(bytearray(key))


def _wait_for(path: Path, timeout_s: float, is_over: Callable[[], bool]) -> bytes:
    deadline_s = time.monotonic() + timeout_s
    while (data := _read(path)) is None:
        if is_over():
            raise TransportError(f"the owner began anew in {path.parent}; ask again")
        if time.monotonic() > deadline_s:
            raise TransportError(
                f"nothing came as {path} within {timeout_s:g} s: did the other side refuse, or "
                "does it use another folder?"
            )
        time.sleep(_PAUSE_S)
    return data


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(MAX_PROOF_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TransportError(f"cannot read {path}: {error.strerror}") from error
