"""Why evidence is refused: one name per reason, carried by every error that this room raises."""

from enum import StrEnum

from cutlayer.errors import AttestationError

__all__ = ["Refusal", "refused"]

_MAX_MESSAGE = 1000


class Refusal(StrEnum):
    """The names are part of the JSON of `cutlayer attest verify`."""

    MALFORMED = "malformed"
    """No parser accepts it."""
    OTHER_PLATFORM = "other-platform"
    """It is evidence of another platform than it says, or than the policy wants."""
    BAD_SIGNATURE = "bad-signature"
    """The quote, report or token is not signed by the key that it names."""
    BAD_CHAIN = "bad-chain"
    """The certificates do not lead to each other."""
    WRONG_ROOT = "wrong-root"
    """The chain ends at another root than the vendor's (or than the one that was named)."""
    NOT_YET_VALID = "not-yet-valid"
    """Certificate or collateral of the future: a wrong clock?"""
    EXPIRED = "expired"
    """Certificate or collateral that has run out."""
    REVOKED = "revoked"
    """On the vendor's revocation list."""
    NO_COLLATERAL = "no-collateral"
    """What the verdict needs beside the evidence is missing."""
    TCB = "tcb"
    """Firmware or microcode whose level the policy does not accept, or that nobody knows."""
    DEBUG = "debug"
    """Built or started so that its owner can look inside."""
    WRONG_MEASUREMENT = "wrong-measurement"
    """Other software, or another configuration, than the policy's reference values."""
    WRONG_BINDING = "wrong-binding"
    """The report data is not that of this key, nonce and spec: stolen or of another job."""
    WRONG_CHIP = "wrong-chip"
    """A chip or provider that the policy does not name."""
    STALE = "stale"
    """Older than the policy allows."""
    REPLAYED = "replayed"
    """The nonce was used before, or was never asked."""
    LOW_ASSURANCE = "low-assurance"
    """Below the policy's least level; simulated evidence where it is not accepted."""
    NO_GPU = "no-gpu"
    """The policy wants an accelerator's evidence too."""
    NO_EVIDENCE = "no-evidence"
    """The peer sent none."""


def refused(reason: Refusal, message: str) -> AttestationError:
    """The error to raise: what, where, what to do.

    Args:
        reason: its name.
        message: for a person; the name is put before it.
    """
    error = AttestationError(f"{reason}: {_one_line(message)}")
    error.refusal = reason
    return error


def _one_line(message: str) -> str:
    # Parts of it are the peer's choice: no line of our logs, and no page of them, is.
    start = message[:_MAX_MESSAGE]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in start)
    return line if len(message) <= _MAX_MESSAGE else f"{line}..."
