"""Keys in pages that the kernel itself cannot read back: memfd_secret, zeroed when closed.

What is done with a key may copy it: a cipher keeps its schedule on the C library's heap, and
`bytes(view)` is an ordinary object. Where the kernel has no such memory, pages are locked and left
out of dumps, and `is_hidden` says so: root reads those through /proc.

Source: Linux, memfd_secret(2).
"""

import ctypes
import hmac
import mmap
import os
from types import TracebackType
from typing import NoReturn

from cutlayer.errors import StorageError
from cutlayer.tee.process.linux import MEMFD_SECRET, system_call

__all__ = ["SecretBytes", "has_secret_memory"]

_FORGOTTEN = "this secret was closed; its bytes are gone"


class SecretBytes:
    """A few bytes that are neither printed, copied by `pickle` nor inherited by a child process."""

    def __init__(self, num_bytes: int) -> None:
        """Zeros; use `random` or `take`.

        Args:
            num_bytes: length, 1 or more.

        Raises:
            StorageError: the kernel gives no page for it.
        """
        assert num_bytes >= 1
        self._num_bytes = num_bytes
        self._pages, self.is_hidden = _new_pages(num_bytes)
        """Whether the kernel hides the pages from everybody, root too."""

    @classmethod
    def random(cls, num_bytes: int) -> "SecretBytes":
        """Fresh random bytes, which were never anywhere else.

        Raises:
            StorageError: the kernel gives no page for them.
        """
        secret = cls(num_bytes)
        with open("/dev/urandom", "rb", buffering=0) as source, secret.view() as view:
            assert source.readinto(view) == num_bytes
        return secret

    @classmethod
    def take(cls, source: bytearray) -> "SecretBytes":
        """The bytes of `source`, which is zeroed.

        Raises:
            StorageError: the kernel gives no page for them.
        """
        secret = cls(len(source))
        with secret.view() as view:
            view[:] = source
        source[:] = bytes(len(source))
        return secret

    def view(self) -> memoryview:
        """The bytes in place, writable; release it (`with`) before the secret is closed.

        Raises:
            StorageError: it was closed.
        """
        if self._pages is None:
            raise StorageError(_FORGOTTEN)
        return memoryview(self._pages)[: self._num_bytes]

    def matches(self, other: bytes) -> bool:
        """Whether these are the bytes, in constant time.

        Raises:
            StorageError: it was closed.
        """
        with self.view() as view:
            return hmac.compare_digest(view, other)

    def close(self) -> None:
        """Overwrite with zeros and give the pages back; a second call does nothing."""
        if self._pages is None:
            return
        pages, self._pages = self._pages, None
        pages[:] = bytes(len(pages))
        pages.close()

    def __enter__(self) -> "SecretBytes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Absent where the kernel gave no pages.
        if getattr(self, "_pages", None) is not None:
            self.close()

    def __len__(self) -> int:
        return self._num_bytes

    def __repr__(self) -> str:
        return f"SecretBytes({self._num_bytes} bytes)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not copied, pickled or sent; pass the object itself")


def has_secret_memory() -> bool:
    """Whether the kernel has memory that it hides from itself."""
    try:
        os.close(system_call(MEMFD_SECRET, os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _new_pages(num_bytes: int) -> tuple[mmap.mmap | None, bool]:
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        pages, is_hidden = _hidden_pages(size), True
    except OSError:
        pages, is_hidden = _locked_pages(size), False
    # A child process would hold the key too, and nobody would zero it there.
    pages.madvise(mmap.MADV_DONTFORK)
    return pages, is_hidden


def _hidden_pages(size: int) -> mmap.mmap:
    descriptor = system_call(MEMFD_SECRET, os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def _locked_pages(size: int) -> mmap.mmap:
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTDUMP)
    except OSError as error:
        raise StorageError(f"no memory for a key of {size} bytes: {error.strerror}") from error
    # Best effort: where the limit forbids it, only the swap is a danger.
    anchor = (ctypes.c_char * size).from_buffer(pages)
    ctypes.CDLL(None).mlock(anchor, ctypes.c_size_t(size))
    del anchor
    return pages
