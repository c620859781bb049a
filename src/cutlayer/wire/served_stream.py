"""One accepted stream at the server: calls in, replies out, bounded memory, ended at any time.

It does not accept connections or know gRPC's server (`grpc_listener`), and runs no call itself.
Three threads meet here: gRPC's pool draws `replies`, a thread of its own runs `read`, and the
listener's monitor runs `check`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import grpc

from cutlayer.errors import CutlayerError, PermissionRefused, TransportError
from cutlayer.wire.channel import Connection, Peer, failed_frame, submit
from cutlayer.wire.endpoints import ListenSettings
from cutlayer.wire.frame import Frame, decode, encode
from cutlayer.wire.stream import Assembler, chunks

__all__ = ["ServedStream"]

_log = logging.getLogger(__name__)
_CUT_AFTER_S = 1.0


class ServedStream:
    """A peer's stream. At most `max_in_flight` calls are unanswered: then nothing more is read,
    and the peer feels the back pressure."""

    def __init__(
        self,
        connection: Connection,
        peer: Peer,
        settings: ListenSettings,
        is_allowed: Callable[[Peer], bool],
        cancel: Callable[[], None],
    ) -> None:
        """`cancel` ends the stream even while a send is stuck; the peer then learns no reason."""
        self.peer = peer
        self.bytes_sent = 0
        self.bytes_received = 0
        self._connection = connection
        self._settings = settings
        self._is_allowed = is_allowed
        self._cancel = cancel
        self._assembler = Assembler(settings.limits)
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(settings.max_in_flight)
        self._replies: SimpleQueue[Frame | None] = SimpleQueue()
        self._unanswered = 0
        self._last_words: CutlayerError | None = None
        self._idle_words: CutlayerError | None = None
        self._ends_when_idle = False
        self._is_draining = False
        self._ended_s: float | None = None
        self._sending_s: float | None = None
        """Since when the chunk being sent has not moved; None while none is."""
        self._reading_s: float | None = None
        """Since when the rest of a started frame is awaited."""

    def read(self, requests: Iterator[bytes]) -> None:
        """Take the peer's bytes until it stops, breaks the format or the stream ends."""
        try:
            for chunk in self._watched(requests):
                for data in self._assembler.feed(chunk):
                    self._accept(decode(data, self._settings.limits))
            self._assembler.finish()
            self._end_when_idle(None)
        except CutlayerError as error:
            self.end(error)
        except grpc.RpcError:  # the peer has gone
            self.end(None)
        except BaseException:
            self.end(CutlayerError("the server failed inside; its log says why"))
            raise

    def replies(self) -> Iterator[bytes]:
        """Chunks of the replies as they become ready.

        Raises:
            CutlayerError: why the stream ends, if the peer should know.
        """
        while not self._has_ended() and (reply := self._replies.get()) is not None:
            for chunk in chunks(encode(reply)):
                self.bytes_sent += len(chunk)
                self._sending_s = time.monotonic()
                yield chunk
                self._sending_s = None
                if self._has_ended():
                    break
            self._answered()
        if self._last_words is not None:
            raise self._last_words

    def check(self, now_s: float) -> None:
        """End the stream if its peer is refused by now, or keeps a frame from moving."""
        limit_s = self._settings.stall_timeout_s
        sending_s, reading_s, ended_s = self._sending_s, self._reading_s, self._ended_s
        if ended_s is not None:
            if sending_s is not None and now_s - ended_s > _CUT_AFTER_S:
                self._cancel()
        elif not self._is_permitted():
            self.end(self._refused())
        elif sending_s is not None and now_s - sending_s > limit_s:
            self.end(TransportError(f"{self.peer.name} read nothing for {limit_s:g} s"))
            self._cancel()
        elif reading_s is not None and now_s - reading_s > limit_s:
            self.end(TransportError(f"the rest of a frame did not come within {limit_s:g} s"))

    def drain(self) -> None:
        """Finish what is in flight, refuse what comes, then end."""
        self._is_draining = True
        self._end_when_idle(TransportError("the server is stopping; try again soon"))

    def end(self, error: CutlayerError | None) -> None:
        """End the stream now; `error` is what the peer will raise. Later calls change nothing."""
        with self._lock:
            if self._ended_s is not None:
                return
            self._ended_s = time.monotonic()
            self._last_words = error
        self._replies.put(None)
        self._slots.release()

    def _watched(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        while True:
            self._reading_s = time.monotonic() if self._assembler.is_partial else None
            chunk = next(requests, None)
            self._reading_s = None
            if chunk is None:
                return
            self.bytes_received += len(chunk)
            yield chunk

    def _accept(self, frame: Frame) -> None:
        if not self._is_permitted():
            raise self._refused()
        self._slots.acquire()
        if self._has_ended():
            return
        with self._lock:
            self._unanswered += 1
        if self._is_draining:
            self._replies.put(failed_frame(frame, TransportError("the server is stopping")))
        else:
            submit(self._connection, frame, self._replies.put)

    def _answered(self) -> None:
        self._slots.release()
        with self._lock:
            self._unanswered -= 1
            is_last = self._ends_when_idle and self._unanswered == 0
        if is_last:
            self.end(self._idle_words)

    def _end_when_idle(self, error: CutlayerError | None) -> None:
        with self._lock:
            self._idle_words = error
            self._ends_when_idle = True
            is_idle = self._unanswered == 0
        if is_idle:
            self.end(error)

    def _has_ended(self) -> bool:
        return self._ended_s is not None

    def _is_permitted(self) -> bool:
        try:
            return self._is_allowed(self.peer)
        except CutlayerError as error:  # a revocation list that cannot be read permits nobody
            _log.error("cannot tell whether %s is allowed: %s", self.peer.name, error)
            return False

    def _refused(self) -> PermissionRefused:
        return PermissionRefused(
            f"the certificate of {self.peer.name!r} (serial {self.peer.serial}) is revoked or no "
            "longer valid; ask the federation's owner"
        )
