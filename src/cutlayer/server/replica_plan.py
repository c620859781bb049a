"""From a front's settings to those of each replica: threads, ports, folders, names.

It starts nothing. What is decided here: replicas share the runs of the front's state folder, so any
of them can open any client's run; logs and locks are each replica's own.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509

from cutlayer.errors import ConfigError
from cutlayer.identity.certificates import hosts_in, load_certificates
from cutlayer.server.replica_settings import ReplicaSettings
from cutlayer.server.settings import ServerSettings, StateSettings
from cutlayer.settings import Settings
from cutlayer.storage.files import explain_os_errors, private_folder
from cutlayer.wire.endpoints import ListenSettings, TlsFiles

__all__ = ["ReplicaPlan", "num_threads", "plan_replica", "public_host"]

_FRONT_ONLY = ("federation", "health_port", "http")
"""Sections that a replica must not act on: its front does."""
_WILDCARDS = {"0.0.0.0", "[::]"}


class ReplicaPlan(Settings):
    """All that a replica is told when it is started."""

    server: ServerSettings
    """Of the ordinary server that it is."""
    admin: ListenSettings
    """Where it takes its front's orders."""


def plan_replica(
    settings: ServerSettings, index: int, admin_tls: TlsFiles, admin_host: str = "127.0.0.1"
) -> ReplicaPlan:
    """The plan of replica `index`.

    Args:
        settings: the front's.
        index: from 0.
        admin_tls: the replica's end of the link to the front.
        admin_host: where it takes the front's orders.

    Raises:
        StorageError: its state folder cannot be made.
    """
    host = settings.listen.address.rpartition(":")[0]
    first = settings.replicas.first_port
    port = 0 if first is None else first + index
    admin = ListenSettings(
        address=f"{admin_host}:0",
        tls=admin_tls,
        max_frame_bytes=settings.listen.max_frame_bytes,
        max_streams=4,
    )
    changes: dict[str, object] = {
        "model": settings.model.model_copy(update={"threads": num_threads(settings)}),
        "listen": settings.listen.model_copy(update={"address": f"{host}:{port}"}),
        "state": _state(settings.state, index),
        "replicas": ReplicaSettings(),
    }
    present = (name for name in _FRONT_ONLY if name in ServerSettings.model_fields)
    own = settings.model_copy(update={**dict.fromkeys(present, None), **changes})
    return ReplicaPlan(server=own, admin=admin)


def num_threads(settings: ServerSettings) -> int:
    """Compute threads of each replica."""
    own = settings.replicas.threads
    if own is None:
        own = max(1, len(os.sched_getaffinity(0)) // max(1, settings.replicas.count))
    return own


def public_host(settings: ServerSettings) -> str:
    """Under which host clients find the replicas of this machine.

    Raises:
        ConfigError: it cannot be told from the settings.
    """
    if settings.replicas.host is not None:
        return settings.replicas.host
    host = settings.listen.address.rpartition(":")[0]
    known = _certified_hosts(settings.listen.tls)
    if host in _WILDCARDS or (known and host.strip("[]") not in known):
        if not known:
            raise ConfigError(
                f"listen.address={settings.listen.address} names no host that clients could use; "
                "set replicas.host"
            )
        return next(iter(known))
    return host


def _certified_hosts(tls: TlsFiles | None) -> tuple[str, ...]:
    if tls is None:
        return ()
    own = load_certificates(tls.certificate)[0]
    try:
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return _usable(hosts_in(names))


def _usable(hosts: Iterable[str]) -> tuple[str, ...]:
    # A name for many hosts is no address.
    return tuple(host for host in hosts if not host.startswith("*"))


def _state(state: StateSettings, index: int) -> StateSettings:
    runs = state.folder / "runs"
    own = private_folder(private_folder(state.folder / "replicas") / str(index))
    with explain_os_errors(f"link {own / 'runs'} to {runs}"):
        runs.mkdir(mode=0o700, exist_ok=True)
        _link(own / "runs", runs)
    return state.model_copy(update={"folder": own})


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target.resolve(), target_is_directory=True)
    elif link.resolve() != target.resolve():
        # The state folder was moved.
        link.unlink()
        link.symlink_to(target.resolve(), target_is_directory=True)
