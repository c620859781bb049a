"""seccomp: system calls that a confined process never makes again, in all its threads.

It is a list of what is forbidden, not of what is allowed: torch and gRPC use different calls on
each C library, so whatever is not named here still works. A forbidden call fails with EPERM.
"""

import ctypes.util
import errno
from typing import Protocol

from cutlayer.errors import ConfigError

__all__ = ["FORBIDDEN", "check_seccomp", "forbid_system_calls"]

_CLONE_THREAD = 0x00010000
_PR_SET_DUMPABLE, _PR_SET_PTRACER = 4, 0x59616D61
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
"""Type into the terminal that started the process: its shell would run what is typed."""
_INT = 0xFFFFFFFF
"""The kernel reads these arguments as 32 bits; compared whole, a bit above would hide them."""
_SOCKETS = ("socket", "socketpair", "bind", "connect", "listen")
_PROGRAMS = ("execve", "execveat", "fork", "vfork")
_OTHER_MEMORY = (
    "kcmp",
    "pidfd_getfd",
    "pidfd_open",
    "process_madvise",
    "process_mrelease",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "userfaultfd",
)
_FILES_AROUND_RULES = (
    # io_uring opens files and sockets without the calls that are filtered here.
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "fanotify_init",
    "mknod",
    "mknodat",
    "name_to_handle_at",
    "open_by_handle_at",
)
_MOUNTS = (
    "chroot",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "pivot_root",
    "setns",
    "swapoff",
    "swapon",
    "umount",
    "umount2",
    "unshare",
)
_KERNEL = (
    "acct",
    "add_key",
    "adjtimex",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "delete_module",
    "finit_module",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "modify_ldt",
    "nfsservctl",
    "perf_event_open",
    "personality",
    "quotactl",
    "reboot",
    "request_key",
    "sethostname",
    "setdomainname",
    "settimeofday",
    "syslog",
    "vhangup",
)
_IDENTITY = (
    "capset",
    "setfsgid",
    "setfsuid",
    "setgid",
    "setgroups",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "setuid",
)
FORBIDDEN = (
    *_SOCKETS,
    *_PROGRAMS,
    *_OTHER_MEMORY,
    *_FILES_AROUND_RULES,
    *_MOUNTS,
    *_KERNEL,
    *_IDENTITY,
)
"""By name; `clone` is forbidden save for threads, `prctl` where it would allow dumps again, `ioctl`
where it types into a terminal."""


class _Filter(Protocol):
    def add_rule(self, action: int, syscall: int | str, *args: object) -> None: ...


def check_seccomp() -> None:
    """Import what makes filters: it looks for its C library with programs that may not run later.

    Raises:
        ConfigError: pyseccomp or its C library is missing.
    """
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise ConfigError(_how_to_install()) from error


def forbid_system_calls() -> int:
    """Load the filter into every thread, for good; the number of rules.

    Raises:
        ConfigError: pyseccomp or its C library is missing.
        OSError: the kernel refused, or a thread has a filter of its own.
    """
    check_seccomp()
    import pyseccomp

    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)
    count = sum(_forbid(rules, pyseccomp.ERRNO(errno.EPERM), name) for name in FORBIDDEN)
    # clone3 hides its flags from filters; without it the C library falls back to clone.
    count += _forbid(rules, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    no, equal = pyseccomp.ERRNO(errno.EPERM), pyseccomp.MASKED_EQ
    rules.add_rule(no, "clone", pyseccomp.Arg(0, equal, _CLONE_THREAD, 0))
    for option in (_PR_SET_DUMPABLE, _PR_SET_PTRACER):
        rules.add_rule(no, "prctl", pyseccomp.Arg(0, equal, _INT, option))
    for command in (_TIOCSTI, _TIOCLINUX):
        rules.add_rule(no, "ioctl", pyseccomp.Arg(1, equal, _INT, command))
    rules.load()
    return count + 5


def _forbid(rules: _Filter, action: int, name: str) -> int:
    """1, or 0 where this architecture or library has no such call."""
    try:
        rules.add_rule(action, name)
    except (OSError, ValueError):
        return 0
    return 1


def _how_to_install() -> str:
    if ctypes.util.find_library("seccomp") is None:
        return (
            "the seccomp filter needs the C library libseccomp; install it (Debian: libseccomp2), "
            "or set confinement.seccomp = false"
        )
    return (
        "the seccomp filter needs pyseccomp; install the extra: pip install 'cutlayer[tee]', or "
        "set confinement.seccomp = false"
    )
