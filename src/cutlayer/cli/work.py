"""What commands share that run other processes: a folder to work in, and an end by SIGTERM.

It starts nothing.
"""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["stop_on_sigterm", "work_folder"]


@contextmanager
def work_folder(keep: Path | None, command: str) -> Iterator[Path]:
    """The folder to keep, private; else one that is removed at the end."""
    from cutlayer.storage.files import private_folder

    if keep is not None:
        yield private_folder(keep.absolute())
        return
    with tempfile.TemporaryDirectory(prefix=f"cutlayer-{command}-") as name:
        yield Path(name)


def stop_on_sigterm() -> None:
    """Unwind the stack on SIGTERM, so that processes are stopped on the way."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
