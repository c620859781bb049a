"""Starting and ending replicas: the Protocol, and processes of this machine.

It does not decide when (`replica_group`). Ray's actors are in `ray_launcher`.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import msgspec

from cutlayer.errors import TransportError, error_from_code
from cutlayer.server.admin_keys import AdminKeys
from cutlayer.server.replica import NotReady, Ready, Told, plan_line
from cutlayer.server.replica_plan import ReplicaPlan, num_threads, plan_replica, public_host
from cutlayer.server.settings import ServerSettings

__all__ = ["Launched", "Launcher", "LocalProcesses", "ready_or_raise", "thread_environment"]

_KILL_S = 30.0


class Launched(Protocol):
    """A replica that listens."""

    @property
    def pid(self) -> int:
        """Its process, on the host where it runs."""

    @property
    def address(self) -> str:
        """host:port for clients."""

    @property
    def admin_address(self) -> str:
        """host:port for the front."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most `timeout_s`."""

    def kill(self) -> None:
        """End it at once; it computes and saves nothing any more when this returns."""

    def stop(self, grace_s: float) -> None:
        """Let its calls in flight finish; after `grace_s` it is killed."""


class Launcher(Protocol):
    """Starts replicas on some engine. Several threads may launch at once."""

    def launch(self, index: int) -> Launched:
        """Start replica `index` and wait until it listens.

        Raises:
            CutlayerError: it did not start.
        """

    def close(self) -> None:
        """Give the engine back; every replica has ended."""


@dataclass(frozen=True, kw_only=True)
class _LocalReplica:
    """A child process that listens."""

    process: "subprocess.Popen[str]"
    address: str
    admin_address: str

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout_s: float) -> bool:
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(_KILL_S)
        _close_pipes(self.process)

    def stop(self, grace_s: float) -> None:
        assert self.process.stdin is not None
        self.process.terminate()
        if not self.wait(grace_s):
            self.process.kill()
            self.process.wait(_KILL_S)
        _close_pipes(self.process)


class LocalProcesses:
    """Replicas as child processes; they end when this process does, however it ends."""

    def __init__(self, settings: ServerSettings, keys: AdminKeys) -> None:
        """Nothing starts yet.

        Raises:
            ConfigError: clients could not reach the replicas.
        """
        self._settings = settings
        self._keys = keys
        self._host = public_host(settings)

    def launch(self, index: int) -> Launched:
        """Start a child and wait until it listens.

        Raises:
            CutlayerError: what it ended with, or TransportError if it took too long.
        """
        plan = plan_replica(self._settings, index, self._keys.replica)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "cutlayer.server.replica"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **thread_environment(num_threads(self._settings))},
            )
        except OSError as error:  # no memory, no process or no open file left: another try may work
            raise TransportError(f"cannot start a replica: {error.strerror or error}") from error
        try:
            ready = self._wait_until_ready(process, plan)
        except BaseException:
            process.kill()
            process.wait(_KILL_S)
            _close_pipes(process)
            raise
        return _LocalReplica(
            process=process,
            address=f"{self._host}:{ready.port}",
            admin_address=f"127.0.0.1:{ready.admin_port}",
        )

    def close(self) -> None:
        """Nothing to give back."""

    def _wait_until_ready(self, process: "subprocess.Popen[str]", plan: ReplicaPlan) -> Ready:
        assert process.stdin is not None
        assert process.stdout is not None
        line = _first_line(process.stdout.readline)
        try:
            process.stdin.write(plan_line(plan) + "\n")
            process.stdin.flush()
            said = line.get(timeout=self._settings.replicas.start_timeout_s)
        except BrokenPipeError:
            said = ""
        except Empty:
            raise TransportError(
                f"a replica did not listen within {self._settings.replicas.start_timeout_s:g} s "
                "(replicas.start_timeout_s)"
            ) from None
        return ready_or_raise(said)


def ready_or_raise(said: str) -> Ready:
    """What a replica told when it started.

    Raises:
        CutlayerError: why it did not.
    """
    try:
        told: Told = msgspec.json.decode(said, type=Told)
    except msgspec.DecodeError:
        raise TransportError("a replica ended before it listened; its log says why") from None
    if isinstance(told, NotReady):
        raise error_from_code(told.code, f"a replica did not start: {told.message}")
    return told


def thread_environment(threads: int) -> Mapping[str, str]:
    """What a replica's process must have in its environment before torch is imported."""
    return {
        # Spinning OpenMP barriers slow the other replicas of the machine down many times over.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GRPC_VERBOSITY": "ERROR",
    }


def _first_line(read: Callable[[], str]) -> "SimpleQueue[str]":
    found: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=lambda: found.put(read()), daemon=True).start()
    return found


def _close_pipes(process: "subprocess.Popen[str]") -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
