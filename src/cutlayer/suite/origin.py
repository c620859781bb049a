"""Where a number comes from: sources, versions, machine. It measures nothing."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cutlayer.suite.result import Origin

__all__ = ["DIRTY", "UNKNOWN", "commit_of", "machine_of", "origin_of"]

DIRTY = "-dirty"
"""Ends the commit of sources that differ from it."""
UNKNOWN = "unknown"
"""Stands for a commit or version where there is none to be found."""
_PACKAGES = ("torch", "transformers", "peft", "cutlayer")
_GIT_S = 20.0


def origin_of(command: str, threads: int, began: str) -> Origin:
    """Where a run of this process comes from.

    Args:
        command: that makes it again.
        threads: that it may use.
        began: UTC, ISO 8601.
    """
    return Origin(
        command=command,
        commit=commit_of(Path(__file__).resolve().parents[1]),
        versions={"python": platform.python_version(), **_versions()},
        machine=machine_of(threads),
        began=began,
    )


def commit_of(package: Path) -> str:
    """The commit that a folder of sources is of, `-dirty` at its end where its files differ.

    Args:
        package: a folder; `unknown` where git has none of its files.
    """
    tracked = _git(package, "ls-files", "--", ".")
    commit = _git(package, "rev-parse", "HEAD")
    # An environment may lie in a checkout of something else, that knows nothing of our files.
    if not tracked or not commit:
        return UNKNOWN
    return f"{commit}{DIRTY}" if _git(package, "status", "--porcelain", "--", ".") else commit


def _git(folder: Path, *words: str) -> str:
    """What git says; nothing where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=_GIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return UNKNOWN


def machine_of(threads: int) -> str:
    """Processor cores, memory, threads and, once torch is loaded, the accelerator."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{platform.machine()}, {cores} cores, {gib:.0f} GiB memory, "
        f"{threads} thread{'s' * (threads != 1)}, {_accelerator()}"
    )


def _accelerator() -> str:
    # Who starts the runs need not load torch; who runs one has.
    if "torch" not in sys.modules:
        return "accelerator not looked for"
    import torch

    if not torch.cuda.is_available():
        return "no accelerator"
    return str(torch.cuda.get_device_name(0))
