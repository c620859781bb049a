"""Child processes of the test process, to see that something left none behind."""

import psutil

__all__ = ["child_processes"]


def child_processes() -> list[psutil.Process]:
    """All of them, but for the helper that Python itself starts for shared memory and keeps."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if not _is_pythons_own(child)]


def _is_pythons_own(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True
