"""The demo's two sides as processes of their own: the trunk server and the training client.

It does not know the task. A server never outlives its `with` block.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cutlayer.errors import CutlayerError, ProtocolError, TransportError, error_from_code

__all__ = ["ServerProcess", "serving", "train_in_process"]

_START_S = 120.0
_STOP_S = 40.0
_POLL_S = 0.1
_LAST_LINES = 5


@dataclass(frozen=True, kw_only=True)
class ServerProcess:
    """A server that is ready."""

    pid: int
    address: str
    """host:port."""
    model_digest: str | None
    log: Path


@contextmanager
def serving(config: Path, folder: Path, start_s: float = _START_S) -> Iterator[ServerProcess]:
    """Run `cutlayer serve` until the block ends, however it ends.

    Args:
        config: the server's settings.
        folder: gets `server.out` and `server.log`.
        start_s: how long it may take to load and listen.

    Raises:
        CutlayerError: it did not start; the message has its last words.
    """
    out, log = folder / "server.out", folder / "server.log"
    with out.open("wb") as out_file, log.open("wb") as log_file:
        process = subprocess.Popen(
            _command("serve", config), stdin=subprocess.DEVNULL, stdout=out_file, stderr=log_file
        )
    try:
        ready = _wait_until_ready(process, out, log, time.monotonic() + start_s)
        yield ServerProcess(
            pid=process.pid,
            address=str(ready["address"]),
            model_digest=None if ready["model_digest"] is None else str(ready["model_digest"]),
            log=log,
        )
    finally:
        _stop(process)


def train_in_process(config: Path) -> dict[str, object]:
    """Run `cutlayer train`; its progress shows on stderr, its result is returned.

    Raises:
        CutlayerError: what it ended with.
    """
    process = subprocess.Popen(
        [*_command("train", config), "--hide-settings"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        output, _ = process.communicate()
    finally:
        _stop(process)
    result = _last_object(output)
    if process.returncode == 0 and result is not None:
        return result
    raise _explain(result, f"cutlayer train ended with exit code {process.returncode}")


def _command(name: str, config: Path) -> list[str]:
    return [sys.executable, "-m", "cutlayer.cli.main", name, "--config", str(config), "--json"]


def _wait_until_ready(
    process: "subprocess.Popen[bytes]", out: Path, log: Path, deadline_s: float
) -> Mapping[str, object]:
    while True:
        said = _last_object(out.read_bytes())
        if said is not None and said.get("event") == "ready":
            return said
        if process.poll() is not None:
            raise _explain(said, f"cutlayer serve did not start: {_tail(log)}")
        if time.monotonic() > deadline_s:
            raise TransportError(f"cutlayer serve was not ready in time: {_tail(log)}")
        time.sleep(_POLL_S)


def _last_object(output: bytes) -> dict[str, object] | None:
    lines = output.decode(errors="replace").splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _explain(said: Mapping[str, object] | None, otherwise: str) -> CutlayerError:
    if said is None or "error" not in said:
        return ProtocolError(otherwise)
    return error_from_code(str(said["error"]), str(said.get("message")))


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return " / ".join(lines[-_LAST_LINES:]) or "it said nothing"


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
