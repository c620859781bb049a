"""A process that ends with whoever started it, however that one ends. It starts none."""

import os
import threading

__all__ = ["LEFT_ALONE", "end_with_stdin"]

LEFT_ALONE = 3
"""Status of a process whose stdin has ended."""


def end_with_stdin() -> None:
    """From now on end this process when its stdin does, a pipe that another holds open."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    # Not through sys.stdin: the interpreter, when it ends, would wait for the reader's lock.
    while os.read(0, 1):
        pass
    os._exit(LEFT_ALONE)
