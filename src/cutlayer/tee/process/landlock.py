"""Landlock: which files a process may still open, whoever its user is.

The kernel holds a thread and those that it starts later to the rules; threads that are there
already stay free (kernels from ABI 8 on hold all). It does not choose the folders (`confine`).

Source: Linux, Documentation/userspace-api/landlock.rst.
"""

import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from cutlayer.tee.process.linux import (
    LANDLOCK_ADD_RULE,
    LANDLOCK_CREATE_RULESET,
    LANDLOCK_RESTRICT_SELF,
    forbid_new_privileges,
    system_call,
)

__all__ = ["landlock_abi", "restrict_files"]

_VERSION, _PATH_BENEATH, _ALL_THREADS = 1, 1, 1 << 3
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_READ = _READ_FILE | _READ_DIR
_OF_A_FILE = 1 << 0 | 1 << 1 | _READ_FILE | 1 << 14 | 1 << 15
_FIRST_RIGHTS = (1 << 13) - 1
_LATER_RIGHTS = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""Right to move between folders, to truncate, to drive devices: by the ABI that added it."""
_NEVER = 1 << 0 | 1 << 6 | 1 << 11 | 1 << 15
"""Starting programs, making device files and driving devices: not even in the state's folder."""
_NETWORK = 0b11
"""Binding and connecting TCP."""
_SCOPES = 0b11
"""Abstract UNIX sockets and signals of processes outside."""


def landlock_abi() -> int:
    """The kernel's version of Landlock; 0 where it has none or it is switched off."""
    try:
        return system_call(LANDLOCK_CREATE_RULESET, None, 0, _VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict_files(readable: Iterable[Path], writable: Iterable[Path], is_final: bool) -> bool:
    """Hold this thread, and those that it starts, to these files and folders for good.

    Args:
        readable: may be read, with what is below them; what cannot be is passed
            over.
        writable: may be read, written, made and removed.
        is_final: also forbid to bind and connect TCP. Programs and signals to processes outside are
            forbidden in any case.

    Returns:
        Whether threads that were there already are held too.

    Raises:
        OSError: the kernel has no Landlock, a writable folder is missing, or the kernel refused.
    """
    abi = landlock_abi()
    rights = _FIRST_RIGHTS | sum(right for since, right in _LATER_RIGHTS.items() if since <= abi)
    ruleset = _new_ruleset(abi, rights, is_final)
    try:
        for path in readable:
            # What this user cannot reach needs no rule.
            if os.access(path, os.R_OK):
                _allow(ruleset, path, _READ)
        for path in writable:
            _allow(ruleset, path, rights & ~_NEVER)
        # Without it only root may restrict itself.
        forbid_new_privileges()
        flags = _ALL_THREADS if abi >= 8 else 0
        system_call(LANDLOCK_RESTRICT_SELF, ruleset, flags)
    finally:
        os.close(ruleset)
    return bool(flags)


def _new_ruleset(abi: int, rights: int, is_final: bool) -> int:
    attributes = struct.pack("<Q", rights)
    if abi >= 4:
        attributes += struct.pack("<Q", _NETWORK if is_final else 0)
    # Before ABI 7, kernels took threads of one process for strangers to each other.
    if abi >= 7:
        attributes += struct.pack("<Q", _SCOPES)
    return system_call(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = rights if path.is_dir() else rights & _OF_A_FILE
        rule = struct.pack("<Qi", allowed, descriptor)
        system_call(LANDLOCK_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)
