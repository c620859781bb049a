"""Replicas as Ray actors: on every host that Ray has, each in a process of its own.

It needs the extra `ray`. It does not place them (Ray does, by `replicas.ray_cpus` and `ray_gpus`)
nor move files: model, certificates and state folder must be at the same paths on every host.
"""

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from cutlayer.errors import ConfigError, CutlayerError, TransportError
from cutlayer.server.admin_keys import AdminKeys
from cutlayer.server.launchers import Launched, ready_or_raise, thread_environment
from cutlayer.server.replica import NotReady, Replica, Told, plan_line, read_plan
from cutlayer.server.replica_plan import num_threads, plan_replica, public_host
from cutlayer.server.settings import ServerSettings
from cutlayer.storage.files import write_atomic
from cutlayer.wire.endpoints import TlsFiles

# Read once, when ray is imported: nothing is told to its makers.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
try:
    import ray
except ImportError as missing:
    raise ConfigError(
        "replicas.engine=ray needs Ray: pip install 'cutlayer[ray]', or use engine=process"
    ) from missing

__all__ = ["RayActors"]

_KILL_S = 30.0


class _Actor:
    """What runs in Ray's process: one replica, and somebody who waits for its end."""

    def __init__(self, plan: str, pems: Mapping[str, bytes], folder: Path) -> None:
        self._plan = plan
        self._pems = pems
        self._own_files = tempfile.TemporaryDirectory(prefix="cutlayer-replica-")
        if folder.is_dir():  # relative paths of the settings mean the front's
            os.chdir(folder)
        self._replica: Replica | None = None
        self._ended = threading.Event()

    def start(self) -> tuple[str, str, int]:
        """What it told, its node's address, its process."""
        address = str(ray.util.get_node_ip_address())
        try:
            told: Told = self._start()
        except CutlayerError as error:
            told = NotReady(code=type(error).__name__, message=str(error))
        return msgspec.json.encode(told).decode(), address, os.getpid()

    def wait(self) -> None:
        """Return when it has stopped; dies with the process."""
        self._ended.wait()

    def stop(self) -> None:
        """Let calls in flight finish."""
        if self._replica is not None:
            self._replica.stop()
        self._own_files.cleanup()
        self._ended.set()

    def _start(self) -> Told:
        plan = read_plan(self._plan)
        # The front's files may be on another host; a replica's own end is all that it gets.
        folder = Path(self._own_files.name)
        for name, content in self._pems.items():
            write_atomic(folder / name, content)
        tls = TlsFiles(**{name: folder / name for name in self._pems})
        admin = plan.admin.model_copy(update={"tls": tls})
        self._replica = Replica(plan.model_copy(update={"admin": admin}))
        return self._replica.start()


@dataclass(frozen=True, kw_only=True)
class _RayReplica:
    """An actor that listens."""

    actor: "ray.actor.ActorHandle"
    ended: "ray.ObjectRef"
    """Settled when the actor stops or dies."""
    pid: int
    address: str
    admin_address: str

    def wait(self, timeout_s: float) -> bool:
        done, _ = ray.wait([self.ended], timeout=timeout_s)
        return bool(done)

    def kill(self) -> None:
        ray.kill(self.actor)
        ray.wait([self.ended], timeout=_KILL_S)

    def stop(self, grace_s: float) -> None:
        ray.wait([self.actor.stop.remote()], timeout=grace_s)
        self.kill()


class RayActors:
    """Starts actors; Ray itself is started here unless `replicas.ray_address` names a cluster."""

    def __init__(self, settings: ServerSettings, keys: AdminKeys) -> None:
        """Join or start Ray.

        Raises:
            ConfigError: there is no such cluster, or clients could not reach the replicas.
        """
        self._settings = settings
        self._keys = keys
        self._own_host = None if settings.replicas.ray_address else public_host(settings)
        self._was_up = ray.is_initialized()
        if not self._was_up:
            self._begin()

    def launch(self, index: int) -> Launched:
        """Start an actor and wait until it listens.

        Raises:
            CutlayerError: why it did not.
        """
        replicas = self._settings.replicas
        # Orders come from this host alone, unless Ray has others.
        admin_host = "127.0.0.1" if replicas.ray_address is None else "0.0.0.0"
        plan = plan_replica(self._settings, index, self._keys.replica, admin_host)
        threads = thread_environment(num_threads(self._settings))
        remote = ray.remote(_Actor).options(
            num_cpus=replicas.ray_cpus,
            num_gpus=replicas.ray_gpus,
            max_restarts=0,
            max_concurrency=3,
            runtime_env={"env_vars": dict(threads)},
        )
        actor = remote.remote(plan_line(plan), _pems(self._keys.replica), Path.cwd())
        try:
            said, node, pid = ray.get(actor.start.remote(), timeout=replicas.start_timeout_s)
            ready = ready_or_raise(said)
        except ray.exceptions.RayError as error:
            ray.kill(actor)
            raise TransportError(f"Ray started no replica: {_first_line(error)}") from error
        except BaseException:
            ray.kill(actor)
            raise
        host = self._own_host or replicas.host or node
        return _RayReplica(
            actor=actor,
            ended=actor.wait.remote(),
            pid=pid,
            address=f"{host}:{ready.port}",
            admin_address=f"{node if replicas.ray_address else '127.0.0.1'}:{ready.admin_port}",
        )

    def close(self) -> None:
        """Leave Ray, or end it if it was started here."""
        if not self._was_up:
            ray.shutdown()

    def _begin(self) -> None:
        address = self._settings.replicas.ray_address
        own = {} if address else {"num_cpus": self._num_cpus(), "include_dashboard": False}
        asked = signal.getsignal(signal.SIGTERM)
        for is_last in (False, True):
            try:
                _init(address or "local", own)
                break
            except (ConnectionError, ValueError, RuntimeError, _NotUp) as error:
                if isinstance(error, _NotUp) and not is_last:
                    continue
                raise ConfigError(
                    f"cannot join Ray at {address or 'this machine'}: {_first_line(error)} "
                    "(replicas.ray_address)"
                ) from error
        if threading.current_thread() is threading.main_thread():
            # Ray takes SIGTERM for itself, and the server would end without draining.
            signal.signal(signal.SIGTERM, asked)

    def _num_cpus(self) -> int:
        """On one machine as many replicas as were asked for fit, however few cores it has."""
        replicas = self._settings.replicas
        return max(1, round(replicas.count * replicas.ray_cpus + 0.5))


class _NotUp(CutlayerError):
    """Ray's own processes did not come up in time; nothing of them is left."""


def _init(address: str, own: Mapping[str, object]) -> None:
    before = set(psutil.Process().children(recursive=True))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError):
        raise
    except Exception as error:  # Ray has no narrower one for a node that does not start
        ray.shutdown()
        left = set(psutil.Process().children(recursive=True)) - before
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_KILL_S)
        raise _NotUp(_first_line(error)) from error


def _pems(files: TlsFiles) -> dict[str, bytes]:
    return {
        "certificate": files.certificate.read_bytes(),
        "key": files.key.read_bytes(),
        "authority": files.authority.read_bytes(),
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
