"""Frames over a byte stream: cut into chunks, put together again under limits.

It does not send or receive; it is plain logic over bytes. A chunk boundary may fall anywhere.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from cutlayer.errors import ProtocolError
from cutlayer.wire.frame import PRELUDE_BYTES, FrameLimits, read_prelude
from cutlayer.wire.packed import Buffer

__all__ = ["CHUNK_BYTES", "Assembler", "chunks"]

CHUNK_BYTES = 1 << 20
"""Largest message given to the transport: one large message under mutual TLS is thrice as slow."""


def chunks(buffers: Iterable[Buffer]) -> Iterator[bytes]:
    """The buffers' bytes in order, in pieces of `CHUNK_BYTES`; the last one is shorter."""
    pieces: list[Buffer] = []
    room = CHUNK_BYTES
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view) >= room:
            yield b"".join([*pieces, view[:room]])
            view, pieces, room = view[room:], [], CHUNK_BYTES
        if len(view):
            pieces.append(view)
            room -= len(view)
    if pieces:
        yield b"".join(pieces)


class Assembler:
    """Whole frames from chunks. Memory is taken only for a frame whose prelude fits the limits."""

    def __init__(self, limits: FrameLimits) -> None:
        self._limits = limits
        self._data = memoryview(bytearray(PRELUDE_BYTES))
        self._filled = 0
        self._has_prelude = False

    @property
    def is_partial(self) -> bool:
        """Some bytes of a frame have come, others have not."""
        return self._filled > 0

    def feed(self, chunk: Buffer) -> Iterator[memoryview]:
        """Take a chunk; gives every frame that it completes, in order.

        Raises:
            ProtocolError: the bytes are no frame, or one beyond the limits.
        """
        view = memoryview(chunk)
        while len(view):
            if not self._filled and len(view) >= PRELUDE_BYTES:
                self._begin(view)
            view = view[self._fill(view) :]
            if self._filled == PRELUDE_BYTES and not self._has_prelude:
                self._begin(self._data)
            if self._has_prelude and self._filled == len(self._data):
                yield self._take()

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            ProtocolError: inside a frame.
        """
        if self.is_partial:
            raise ProtocolError(
                f"the stream ended inside a frame, after {self._filled} of its bytes"
            )

    def _fill(self, view: memoryview) -> int:
        size = min(len(view), len(self._data) - self._filled)
        self._data[self._filled : self._filled + size] = view[:size]
        self._filled += size
        return size

    def _begin(self, prelude: memoryview) -> None:
        """Make room for the frame that starts so."""
        # unlike bytearray(n) this touches no page until bytes arrive: a claimed length is free
        whole = np.empty(read_prelude(prelude, self._limits).total_bytes, np.uint8).data
        whole[: self._filled] = self._data[: self._filled]
        self._data = whole
        self._has_prelude = True

    def _take(self) -> memoryview:
        data = self._data
        self._data = memoryview(bytearray(PRELUDE_BYTES))
        self._filled, self._has_prelude = 0, False
        return data
