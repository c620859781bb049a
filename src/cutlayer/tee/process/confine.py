"""Give up what a worker needs no more, once its sockets listen; say what was really given up.

    is_early = confine_files(settings, [keys])  # first of all, while there is one thread
    ...                                         # load the model, open the sockets
    report = confine(settings, is_early)        # then all of it

Landlock binds a thread and those that it starts. Threads of gRPC and of torch are there before the
sockets listen, and start others, so the early rules are what binds them.

The report is read back from the kernel and not assumed. Assurance stays SIMULATED whatever it
says: the machine's root and its kernel see the rest. It starts no process and holds no key.
"""

import os
import pwd
import resource
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from cutlayer.errors import ConfigError
from cutlayer.settings import Settings
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.measure import PACKAGE_FOLDER
from cutlayer.tee.process.landlock import landlock_abi, restrict_files
from cutlayer.tee.process.linux import (
    forbid_dumps,
    is_dumpable,
    lock_all_memory,
    own_status,
    thread_statuses,
)
from cutlayer.tee.process.seccomp import check_seccomp, forbid_system_calls
from cutlayer.tee.process.secret import has_secret_memory

__all__ = ["Confinement", "ConfinementSettings", "confine", "confine_files"]

_DEVICES = ("/dev/null", "/dev/urandom", "/proc/self", "/proc/cpuinfo")
_SYSTEM = (
    *_DEVICES,
    "/dev/random",
    "/etc/gai.conf",
    "/etc/group",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/resolv.conf",
    "/etc/ssl",
    "/lib",
    "/lib64",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/sys",
    "/sys/devices/system",
    "/sys/fs/cgroup",
    "/usr",
)
_FILTERED = "2"


class ConfinementSettings(Settings):
    """What a worker process gives up after its sockets listen."""

    readable: list[Path] = Field(default=[])
    """Files and folders that may still be read: the model."""
    writable: list[Path] = Field(default=[])
    """Folders that may still be read and written: the state. They must exist; temporary files go to
    the first."""
    uid: int | None = Field(default=None, ge=1)
    """User id to become where the process runs as root, its own alone; None stays root."""
    seccomp: bool = True
    """No new sockets, programs or processes, nor looks into others; needs the extra `tee`."""
    landlock: bool = True
    """No other files; where the kernel has it."""
    program_files: bool = True
    """Python's own files stay readable: libraries load some of them late."""
    lock_memory: bool = True
    """Nothing goes to the swap; where the limit allows it."""
    required: bool = False
    """Refuse to serve where any of it could not be applied."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What was really applied, as the kernel tells it."""

    uid: int
    is_root: bool
    no_new_privileges: bool
    no_dumps: bool
    seccomp_rules: int
    """0: no filter. Otherwise every thread has it."""
    landlock_abi: int
    """0: none."""
    num_free_threads: int
    """Threads that no Landlock rules bind."""
    is_memory_locked: bool
    has_secret_memory: bool
    missing: tuple[str, ...] = field(default=())
    """What could not be applied, each with its reason."""

    @property
    def assurance(self) -> Assurance:
        """Always the lowest: a process cannot hide from the kernel that runs it."""
        return Assurance.SIMULATED

    def details(self) -> dict[str, str]:
        """For attestation details, logs and JSON; no paths."""
        return {
            "confinement": self.assurance.label,
            "uid": str(self.uid),
            "no_new_privileges": _yes(self.no_new_privileges),
            "no_dumps": _yes(self.no_dumps),
            "seccomp_rules": str(self.seccomp_rules),
            "landlock_abi": str(self.landlock_abi),
            "free_threads": str(self.num_free_threads),
            "memory_locked": _yes(self.is_memory_locked),
            "secret_memory": _yes(self.has_secret_memory),
            "missing": "; ".join(self.missing) or "nothing",
        }

    def lines(self) -> list[str]:
        """For whoever starts the worker."""
        named = ", ".join(f"{name} {value}" for name, value in self.details().items())
        return [f"{self.assurance.label}: a confined process, not a TEE ({named})"]


def confine_files(settings: ConfinementSettings, also: Sequence[Path] = ()) -> bool:
    """Early rules: the settings' folders, Python's and the system's files, no programs.

    Args:
        settings: what stays readable and writable.
        also: what is read until the sockets listen: settings, certificates, keys. Call it before
            numpy, torch or gRPC start threads.

    Returns:
        Whether Landlock binds the process from here on.

    Raises:
        ConfigError: a writable folder does not exist, pyseccomp is missing, or Landlock is required
            and missing.
    """
    _check(settings)
    if not settings.landlock:
        return False
    # Python looks for a folder that it may write to, and some libraries do on import.
    tempfile.tempdir = str(settings.writable[0]) if settings.writable else tempfile.gettempdir()
    steps = _Steps()
    readable = [*settings.readable, *also, *_program_files(), *map(Path, _SYSTEM)]
    writable = [*settings.writable, Path("/dev/null")]
    steps.run("landlock", lambda: restrict_files(readable, writable, is_final=False))
    if steps.missing and settings.required:
        raise _refusal(steps.missing)
    return not steps.missing


def confine(settings: ConfinementSettings, is_early: bool = False) -> Confinement:
    """Give up everything that the settings name, for good; after the sockets listen.

    Args:
        settings: what stays allowed.
        is_early: what `confine_files` returned at the start; False where it was not called.

    Raises:
        ConfigError: pyseccomp is missing, a folder is missing or not the new user's, or something
            that is required could not be applied.
    """
    steps = _Steps()
    _check(settings)
    steps.run("core dumps", _forbid_core_files)
    if settings.lock_memory:
        steps.run("locked memory", _lock_memory)
    _become(settings, steps)
    # Changing the user makes a process dumpable by the system's own setting.
    steps.run("dumps", forbid_dumps)
    if settings.landlock:
        steps.run("landlock", lambda: steps.held(_restrict_files(settings), is_early))
    if settings.seccomp:
        steps.run("seccomp", lambda: steps.filtered(forbid_system_calls()))
    report = _report(settings, steps)
    if report.missing and settings.required:
        raise _refusal(report.missing)
    return report


class _Steps:
    """What went wrong so far, and what the kernel does not tell."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.done: set[str] = set()
        self.num_rules = 0
        self.num_free_threads = 0

    def run(self, name: str, step: Callable[[], object]) -> None:
        try:
            step()
        except OSError as error:
            self.missing.append(f"{name}: {error.strerror or error}")
        else:
            self.done.add(name)

    def held(self, are_all_held: bool, is_early: bool) -> None:
        num_older = 0 if are_all_held else len(thread_statuses()) - 1
        self.num_free_threads = 0 if is_early else num_older
        if self.num_free_threads:
            self.missing.append(
                f"landlock: {num_older} older threads, and what they start, are free; call "
                "confine_files before they start"
            )

    def filtered(self, num_rules: int) -> None:
        self.num_rules = num_rules


def _check(settings: ConfinementSettings) -> None:
    """Refuse what cannot work, before anything is given up."""
    if sys.platform != "linux":
        raise ConfigError("a process is confined by Linux alone; run it there, or do without")
    if settings.seccomp:
        check_seccomp()
    for path in settings.writable:
        if not os.path.exists(path):
            raise ConfigError(f"{path} does not exist; make it before the process is confined")
    _check_owners(settings)


def _check_owners(settings: ConfinementSettings) -> None:
    if settings.uid is None or os.geteuid() != 0:
        return
    for path in settings.writable:
        if path.stat().st_uid != settings.uid:
            raise ConfigError(
                f"{path} belongs to user {path.stat().st_uid}, the worker becomes {settings.uid}: "
                f"chown -R {settings.uid} it first"
            )


def _forbid_core_files() -> None:
    # A core pattern that is a pipe ignores this limit; `forbid_dumps` stops that too.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _lock_memory() -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        # Under a finite limit every later allocation beyond it would fail.
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
        except (ValueError, OSError) as error:
            raise PermissionError(0, "the limit of locked memory is finite (ulimit -l)") from error
    lock_all_memory()


def _become(settings: ConfinementSettings, steps: _Steps) -> None:
    if os.geteuid() != 0:
        return
    if settings.uid is None:
        steps.missing.append("own user: it is root; name confinement.uid, or start it as a user")
        return
    steps.run("own user", lambda: _change_user(settings.uid or 0))


def _change_user(uid: int) -> None:
    try:
        gid = pwd.getpwuid(uid).pw_gid
    except KeyError:
        gid = uid
    # The C library changes all threads at once.
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _restrict_files(settings: ConfinementSettings) -> bool:
    program = _program_files() if settings.program_files else []
    readable = [*settings.readable, *program, *map(Path, _DEVICES)]
    return restrict_files(readable, [*settings.writable, Path("/dev/null")], is_final=True)


def _program_files() -> list[Path]:
    """Where Python and what is installed beside it lie; what it was told to import as well."""
    named = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *sys.path}
    # The folder in which it was started may be anybody's home; the root would allow everything.
    open_ = {Path.cwd(), Path("/")}
    return sorted({Path(name).resolve() for name in named} - open_ | {PACKAGE_FOLDER})


def _report(settings: ConfinementSettings, steps: _Steps) -> Confinement:
    status, threads = own_status(), thread_statuses()
    missing = list(steps.missing)
    num_unfiltered = sum(thread.get("Seccomp") != _FILTERED for thread in threads)
    if settings.seccomp and num_unfiltered:
        missing.append(f"seccomp: {num_unfiltered} threads are without the filter")
    is_filtered = not num_unfiltered
    return Confinement(
        uid=os.getuid(),
        is_root=os.geteuid() == 0,
        no_new_privileges=status.get("NoNewPrivs") == "1",
        no_dumps=not is_dumpable(),
        seccomp_rules=steps.num_rules if is_filtered else 0,
        landlock_abi=landlock_abi() if "landlock" in steps.done else 0,
        num_free_threads=steps.num_free_threads,
        is_memory_locked="locked memory" in steps.done,
        has_secret_memory=has_secret_memory(),
        missing=tuple(missing),
    )


def _refusal(missing: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"this process cannot be confined as required: {'; '.join(missing)}; use a kernel and "
        "limits that allow it, or set confinement.required = false"
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
