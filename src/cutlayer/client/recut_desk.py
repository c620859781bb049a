"""How `cutlayer recut` reaches a process that trains: small private files in the run's folder.

It moves nothing (`recut`). The trainer leaves `recut.ready` while it listens; a command leaves
`recut.request`, of which there is one at a time, and waits for `recut.answer.NAME`.
"""

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

from cutlayer.client.recut import RecutReport
from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    StorageError,
    TransportError,
    error_from_code,
)
from cutlayer.storage.files import explain_os_errors, read_private, write_atomic

__all__ = ["Desk", "RecutRequest", "ask", "is_attended"]

T = TypeVar("T")
_READY, _REQUEST, _ANSWER = "recut.ready", "recut.request", "recut.answer"
_POLL_S = 0.05
_SAME_S = 1.0


class RecutRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a command wants."""

    name: str
    """Chosen at random."""
    lower: int | None
    """None leaves it where it is."""
    upper: int | None
    share_adapter: bool


class _Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Who listens."""

    pid: int
    born_s: float
    """When the process was made: numbers of processes come again."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request: a report, or an error of ours."""

    report: RecutReport | None = None
    code: str = ""
    message: str = ""


class Desk:
    """The trainer's side; the folder's lock is its own."""

    def __init__(self, folder: Path) -> None:
        """Listen from now on; what an earlier process left is thrown away."""
        self._folder = folder
        for path in folder.glob("recut.*"):
            path.unlink(missing_ok=True)
        _write(folder / _READY, _Ready(pid=os.getpid(), born_s=psutil.Process().create_time()))

    @property
    def has_request(self) -> bool:
        """Whether a command waits; cheap enough to ask between any two steps."""
        return (self._folder / _REQUEST).exists()

    def request(self) -> RecutRequest | None:
        """What the command that waits wants; one that cannot be read is thrown away."""
        try:
            return _read(self._folder / _REQUEST, RecutRequest)
        except StorageError:
            self._dismiss()
            return None

    def done(self, request: RecutRequest, report: RecutReport) -> None:
        """Tell the command what was done."""
        self._answer(request, _Answer(report=report))

    def refused(self, request: RecutRequest, error: CutlayerError) -> None:
        """Tell the command why it was not done."""
        self._answer(request, _Answer(code=type(error).__name__, message=str(error)))

    def close(self) -> None:
        """Listen no longer; a command that still waits is told so."""
        (self._folder / _READY).unlink(missing_ok=True)
        request = self.request()
        if request is not None:
            self.refused(
                request, ConfigError("the training ended before it could re-cut; ask again")
            )

    def _answer(self, request: RecutRequest, answer: _Answer) -> None:
        # On a full disk the command hears nothing but that its request is gone: training goes on.
        with suppress(StorageError):
            _write(self._folder / f"{_ANSWER}.{request.name}", answer)
        self._dismiss()

    def _dismiss(self) -> None:
        (self._folder / _REQUEST).unlink(missing_ok=True)


def is_attended(folder: Path) -> bool:
    """Whether a process trains here and takes requests."""
    try:
        ready = _read(folder / _READY, _Ready)
    except StorageError:
        return False
    return ready is not None and _is_alive(ready)


def ask(
    folder: Path,
    lower: int | None,
    upper: int | None,
    share_adapter: bool,
    timeout_s: float,
) -> RecutReport:
    """Have the process that trains in a run's folder move the cut, and wait until it did.

    Args:
        folder: of the run.
        lower: first block of the trunk; None leaves it.
        upper: first block of the tail; None leaves it.
        share_adapter: the owner accepts that the adapters of blocks that leave become visible.
        timeout_s: what it may take.

    Raises:
        ConfigError: another command waits already, or the trainer refused.
        TransportError: nobody answered in time, or the trainer ended.
        CutlayerError: whatever went wrong there.
    """
    name = secrets.token_hex(8)
    request = RecutRequest(name=name, lower=lower, upper=upper, share_adapter=share_adapter)
    _leave(folder, request)
    answer = _wait(folder, name, time.monotonic() + timeout_s)
    if answer.report is not None:
        return answer.report
    raise error_from_code(answer.code, answer.message)


def _leave(folder: Path, request: RecutRequest) -> None:
    """Exactly one request at a time: a link to a whole file is made, or it is there already."""
    draft = folder / f"recut.draft.{request.name}"
    _write(draft, request)
    try:
        with explain_os_errors(f"leave a request in {folder}"):
            os.link(draft, folder / _REQUEST)
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError):
            raise ConfigError(
                f"another re-cut of the run in {folder} is waiting; ask again when it is done"
            ) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


def _wait(folder: Path, name: str, deadline_s: float) -> _Answer:
    path = folder / f"{_ANSWER}.{name}"
    while True:
        # The answer last: a trainer answers before it dismisses a request, or ends.
        is_here, is_late = is_attended(folder), time.monotonic() > deadline_s
        is_waiting = (folder / _REQUEST).exists()
        answer = _read(path, _Answer)
        if answer is not None:
            path.unlink(missing_ok=True)
            return answer
        if is_late or not (is_here and is_waiting):
            _withdraw(folder, name)
            what = "has not answered yet" if is_here and is_waiting else "ended before it answered"
            raise TransportError(
                f"the training in {folder} {what}; the run is at its old cut or at the new one, "
                "and asking again does no harm"
            )
        time.sleep(_POLL_S)


def _withdraw(folder: Path, name: str) -> None:
    with suppress(StorageError):
        request = _read(folder / _REQUEST, RecutRequest)
        if request is not None and request.name == name:
            (folder / _REQUEST).unlink(missing_ok=True)


def _write(path: Path, value: msgspec.Struct) -> None:
    write_atomic(path, msgspec.json.encode(value))


def _read(path: Path, kind: type[T]) -> T | None:
    """None where there is no such file."""
    try:
        return msgspec.json.decode(read_private(path), type=kind)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is damaged; remove it") from error


def _is_alive(ready: _Ready) -> bool:
    try:
        born_s = psutil.Process(ready.pid).create_time()
    except psutil.Error:
        return False
    return bool(abs(born_s - ready.born_s) < _SAME_S)
