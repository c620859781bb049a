"""Counts what a process does to its disk and its link during a re-cut; at a chosen count, kill -9.

It starts nothing and judges nothing (`recut_crashes`).
"""

import os
import signal
from collections.abc import Callable
from typing import Protocol, TypeVar

__all__ = ["Boundaries", "Number"]

F = TypeVar("F")
_CHANGES = ("replace", "rename", "link", "unlink", "mkdir", "rmdir", "fsync")
"""Functions of `os` with which a folder or a file changes, or becomes durable."""


class Number(Protocol):
    """A whole number that several processes see."""

    value: int


class Boundaries:
    """Of one process; every boundary lies before or after something that cannot be undone."""

    def __init__(self, kill_at: Number, most: Number) -> None:
        """
        Args:
            kill_at: which boundary of a re-cut is its last; below 0 none is.
            most: where the largest number of boundaries of a re-cut is written.
        """
        self._kill_at, self._most = kill_at, most
        self._count: int | None = None

    def watch_files(self) -> None:
        """Count the changes of files from now on, in all of this process."""
        for name in _CHANGES:
            setattr(os, name, self.around(getattr(os, name)))

    def around(self, function: F) -> F:
        """The same function with a boundary before and one after it."""
        assert callable(function)
        inner: Callable[..., object] = function

        def counted(*args: object, **kwargs: object) -> object:
            self._pass()
            result = inner(*args, **kwargs)
            self._pass()
            return result

        return counted  # type: ignore[return-value]

    def begin(self) -> None:
        """A re-cut begins, unless one is under way already."""
        self._count = self._count or 0

    def end(self) -> None:
        """It is over."""
        self._most.value = max(self._most.value, self._count or 0)
        self._count = None

    def _pass(self) -> None:
        if self._count is None:
            return
        if self._count == self._kill_at.value:
            os.kill(os.getpid(), signal.SIGKILL)
        self._count += 1
