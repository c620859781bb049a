"""System calls that Python has no function for. It decides nothing: `confine` does.

Numbers above 423 are the same on every architecture that Linux and torch share.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

__all__ = [
    "LANDLOCK_ADD_RULE",
    "LANDLOCK_CREATE_RULESET",
    "LANDLOCK_RESTRICT_SELF",
    "MEMFD_SECRET",
    "forbid_dumps",
    "forbid_new_privileges",
    "is_dumpable",
    "lock_all_memory",
    "own_status",
    "system_call",
    "thread_statuses",
]

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
MEMFD_SECRET = 447

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 3, 4, 38
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_LIBC = ctypes.CDLL(None, use_errno=True)


def system_call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call; bytes are passed by their address.

    Raises:
        OSError: it failed, or this is another system, where the number means something else.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "a system call of Linux")
    given = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    return _checked(_LIBC.syscall(ctypes.c_long(number), *given))


def forbid_dumps() -> None:
    """No core dump, and no debugger of the same user: the process is not dumpable.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def is_dumpable() -> bool:
    """Whether the process may be dumped or debugged by its user.

    Raises:
        OSError: the kernel refused.
    """
    return _prctl(_PR_GET_DUMPABLE, 0) != 0


def forbid_new_privileges() -> None:
    """No set-uid program gives this thread, or one that it starts, more than it has.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def lock_all_memory() -> None:
    """Keep every page, also future ones, out of the swap from its first touch on.

    Raises:
        OSError: the limit does not allow it.
    """
    _checked(_LIBC.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))


def own_status() -> dict[str, str]:
    """The fields of this process in /proc.

    Raises:
        OSError: there is no /proc.
    """
    return _status(Path("/proc/self/status"))


def thread_statuses() -> list[dict[str, str]]:
    """The same for each of its threads; one that ends meanwhile is left out.

    Raises:
        OSError: there is no /proc.
    """
    found = []
    for name in os.listdir("/proc/self/task"):
        try:
            found.append(_status(Path("/proc/self/task") / name / "status"))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _status(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _prctl(option: int, value: int) -> int:
    return _checked(
        _LIBC.prctl(ctypes.c_int(option), *(ctypes.c_ulong(x) for x in (value, 0, 0, 0)))
    )


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)
