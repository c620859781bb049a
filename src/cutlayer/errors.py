"""Every exception that cutlayer raises on purpose.

    CutlayerError
    ├── ConfigError            a setting, a file or a command is wrong; nothing was started
    │   ├── SpecMismatch       the two sides describe different models, cuts or formats
    │   ├── ModelError         a model folder or architecture that cannot be cut or loaded
    │   └── DataError          a row, a line or a column of the owner's data is wrong
    ├── StorageError           a file cannot be written, read or trusted
    ├── TransportError         the link broke or a deadline passed; retried, bounded
    ├── ProtocolError          the peer sent something that the format forbids; never retried
    ├── PermissionRefused      the certificate is revoked, expired or lacks the role
    ├── SessionLost            the server no longer holds this session; the client replays
    ├── StepExpired            the server is at another step; the client goes back to a common one
    ├── CacheFull              no KV bytes left; carries when to ask again
    ├── BudgetExceeded         the privacy budget forbids this release; stop
    ├── AttestationError       the evidence does not satisfy the policy; stop
    ├── PeerMisbehaved         what the server returned is not what an honest trunk returns; stop
    └── QuorumNotMet           too few members answered; no round

It does not decide what to do about them: `cli` maps each to an exit code (`EXIT_CODES`),
`wire` maps those of a peer to and from error frames by `code`.
"""

__all__ = [
    "EXIT_CODES",
    "AttestationError",
    "BudgetExceeded",
    "CacheFull",
    "ConfigError",
    "CutlayerError",
    "DataError",
    "ModelError",
    "PeerMisbehaved",
    "PermissionRefused",
    "ProtocolError",
    "QuorumNotMet",
    "SessionLost",
    "SpecMismatch",
    "StepExpired",
    "StorageError",
    "TransportError",
    "error_from_code",
]


class CutlayerError(Exception):
    """Base of the tree. Its message says what, where and what to do."""


class ConfigError(CutlayerError):
    """A setting, a file or a command is wrong; nothing was started."""


class SpecMismatch(ConfigError):
    """The two sides describe different models, cuts or formats."""


class ModelError(ConfigError):
    """A model folder or an architecture that cannot be cut or loaded."""


class DataError(ConfigError):
    """A row, a line or a column of the owner's data is wrong."""


class StorageError(CutlayerError):
    """A file cannot be written, read or trusted."""


class TransportError(CutlayerError):
    """The link broke or a deadline passed; retried, bounded."""


class ProtocolError(CutlayerError):
    """The peer sent something that the format forbids; never retried."""


class PermissionRefused(CutlayerError):
    """The certificate is revoked, expired or lacks the role."""


class SessionLost(CutlayerError):
    """The server no longer holds this session; the client replays its released history."""

    lost_rows: tuple[int, ...] = ()
    """Rows of the call that are gone; empty means the whole session."""


class StepExpired(CutlayerError):
    """The server is at another training step; the client goes back to a common one."""


class CacheFull(CutlayerError):
    """No KV bytes left for another session or row."""

    retry_after_s: float | None = None
    """When to ask again; None says nothing."""


class BudgetExceeded(CutlayerError):
    """The privacy budget forbids this release."""


class AttestationError(CutlayerError):
    """The evidence does not satisfy the policy."""

    refusal: str = ""
    """Name of the reason (`tee.refusal`); empty where a peer sent the error."""


class PeerMisbehaved(CutlayerError):
    """What the server returned is not what an honest trunk returns."""


class QuorumNotMet(CutlayerError):
    """Too few members answered; the round is not applied."""


EXIT_CODES: dict[type[CutlayerError], int] = {
    ConfigError: 2,
    SpecMismatch: 3,
    ModelError: 4,
    DataError: 5,
    StorageError: 6,
    TransportError: 7,
    ProtocolError: 8,
    PermissionRefused: 9,
    SessionLost: 10,
    StepExpired: 10,
    CacheFull: 11,
    BudgetExceeded: 12,
    AttestationError: 13,
    QuorumNotMet: 14,
    PeerMisbehaved: 15,
    CutlayerError: 1,
}
"""Process exit code per error, nearest class first; documented in docs/cli.md."""

_BY_CODE = {error.__name__: error for error in EXIT_CODES}


def error_from_code(code: str, message: str) -> CutlayerError:
    """The exception that an error frame's code names; an unknown code is a ProtocolError."""
    error = _BY_CODE.get(code)
    return (
        ProtocolError(f"peer sent unknown error {code!r}: {message}")
        if error is None
        else error(message)
    )
