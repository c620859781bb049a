"""Both sides as processes of their own: the trunk server, and clients that train.

It does not know the task. No process outlives its `with` block or its call.
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

__all__ = ["ServerProcess", "serving", "train_in_process", "train_in_processes"]

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
def serving(
    config: Path, folder: Path, start_s: float = _START_S, trace: Path | None = None
) -> Iterator[ServerProcess]:
    """Run `cutlayer serve` until the block ends, however it ends.

    Args:
        config: the server's settings.
        folder: gets `server.out` and `server.log`.
        start_s: how long it may take to load and listen.
        trace: where its timeline goes, if wanted.

    Raises:
        CutlayerError: it did not start; the message has its last words.
    """
    out, log = folder / "server.out", folder / "server.log"
    with out.open("wb") as out_file, log.open("wb") as log_file:
        process = subprocess.Popen(
            _command("serve", config, trace),
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=log_file,
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


def train_in_processes(
    configs: Mapping[str, Path], folder: Path, traces: Mapping[str, Path] | None = None
) -> dict[str, dict[str, object]]:
    """Run `cutlayer train` for several owners at once; the first that fails ends all.

    Args:
        configs: settings file by owner.
        folder: gets `OWNER.out` and `OWNER.log`.
        traces: where each owner's timeline goes, if wanted.

    Raises:
        CutlayerError: what the first failing owner ended with.
    """
    running = {
        name: _start(name, config, folder, (traces or {}).get(name))
        for name, config in configs.items()
    }
    try:
        _wait_for_all(running, folder)
    finally:
        for process in running.values():
            _stop(process)
    return {name: _result(name, process, folder) for name, process in running.items()}


def _start(name: str, config: Path, folder: Path, trace: Path | None) -> "subprocess.Popen[bytes]":
    out, log = folder / f"{name}.out", folder / f"{name}.log"
    with out.open("wb") as out_file, log.open("wb") as log_file:
        return subprocess.Popen(
            [*_command("train", config, trace), "--hide-settings"],
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=log_file,
        )


def _wait_for_all(running: Mapping[str, "subprocess.Popen[bytes]"], folder: Path) -> None:
    while any(process.poll() is None for process in running.values()):
        for name, process in running.items():
            if process.poll():
                _result(name, process, folder)
        time.sleep(_POLL_S)


def _result(name: str, process: "subprocess.Popen[bytes]", folder: Path) -> dict[str, object]:
    said = _last_object((folder / f"{name}.out").read_bytes())
    if process.returncode == 0 and said is not None:
        return said
    last_words = _tail(folder / f"{name}.log")
    error = _explain(
        said, f"cutlayer train ended with exit code {process.returncode}: {last_words}"
    )
    raise type(error)(f"owner {name}: {error}")


def _command(name: str, config: Path, trace: Path | None = None) -> list[str]:
    command = [sys.executable, "-m", "cutlayer.cli.main", name, "--config", str(config), "--json"]
    return command if trace is None else [*command, "--trace", str(trace)]


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
