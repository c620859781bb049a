"""An owner that trains as a process of its own, so that its memory is its own.

    python -m cutlayer.suite.owner_process CLIENT.toml RESULT.json

It holds what `cutlayer train` holds while it trains. It does not score.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cutlayer.client.client import Client
from cutlayer.client.settings import ClientSettings
from cutlayer.client.train import Report
from cutlayer.errors import CutlayerError, ProtocolError, error_from_code
from cutlayer.planner.baseline import peak_resident_bytes
from cutlayer.settings import load_settings
from cutlayer.simulation.settings_text import settings_text
from cutlayer.storage.files import explain_os_errors, write_atomic

__all__ = ["Trained", "main", "read_trained", "train_in_own_process"]


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What an owner's training took."""

    num_tokens: int
    """Of the rows of all steps."""
    seconds: float
    """Without loading the model."""
    bytes_up: int
    bytes_down: int
    guarantee: str
    peak_bytes: int | None = None
    """Largest resident memory of its process; None where the server is in the same."""


class _Failed(msgspec.Struct, frozen=True, kw_only=True):
    error: str
    """Class of the exception, which is its code."""
    message: str


def train_in_own_process(owner: ClientSettings, folder: Path) -> Trained:
    """Train as a process, which is gone when this returns or raises.

    Args:
        owner: its settings; the server of their address is running.
        folder: gets `owner.toml`, `owner.json` and `owner.log`.

    Raises:
        CutlayerError: what it ended with.
    """
    config, result, log = (folder / f"owner.{kind}" for kind in ("toml", "json", "log"))
    write_atomic(config, settings_text(owner).encode())
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "cutlayer.suite.owner_process", str(config), str(result)]
    with explain_os_errors(f"write {log}"), log.open("wb") as file:
        # An exception here, Ctrl-C too, kills the child.
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
        ).returncode
    if not result.exists():
        # Not in the error, which is kept for all to read: a library's message may hold a text.
        print(log.read_text(errors="replace"), file=sys.stderr)
        raise ProtocolError(
            f"the owner's process ended with exit code {code}; the run's log has more"
        )
    return read_trained(result)


def main(argv: Sequence[str] | None = None) -> int:
    """Be that process; 0, or 1 where the training failed."""
    config, result = (Path(text) for text in (sys.argv[1:] if argv is None else argv))
    told: Trained | _Failed
    try:
        told = _train(load_settings(ClientSettings, config))
    except CutlayerError as error:
        told = _Failed(error=type(error).__name__, message=str(error))
    write_atomic(result, msgspec.json.encode(told))
    return int(isinstance(told, _Failed))


def _train(settings: ClientSettings) -> Trained:
    num_tokens = 0

    def count(report: Report) -> None:
        nonlocal num_tokens
        num_tokens += report.record.num_tokens

    with Client(settings) as client:
        began_s = time.monotonic()
        client.train(count)
        return Trained(
            num_tokens=num_tokens,
            seconds=time.monotonic() - began_s,
            bytes_up=client.trunk.bytes_sent,
            bytes_down=client.trunk.bytes_received,
            guarantee=client.guarantee,
            peak_bytes=peak_resident_bytes(),
        )


def read_trained(result: Path) -> Trained:
    """What `main` wrote.

    Raises:
        CutlayerError: what the training ended with.
    """
    raw = result.read_bytes()
    try:
        return msgspec.json.decode(raw, type=Trained)
    except msgspec.ValidationError:
        failed = msgspec.json.decode(raw, type=_Failed)
    raise error_from_code(failed.error, failed.message)


if __name__ == "__main__":
    sys.exit(main())
