"""The thread that takes the decoder's turns, so that many callers share its streams.

It does not generate (`decoder`) nor know text or HTTP. What a caller hands in is called on the
engine's thread: it must be short, and must not wait for the engine.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cutlayer.client.decoder import Decoder
from cutlayer.client.session import GenerationSession
from cutlayer.client.streams import Request, Stream
from cutlayer.errors import CutlayerError, TransportError
from cutlayer.privacy.ledger import LedgerSummary

__all__ = ["Engine", "EngineStatus", "Meters", "OnEnd"]

_log = logging.getLogger(__name__)
_RATE_S = 10.0
_TIDY_S = 10.0
_CLOSE_S = 3.0
"""How long a turn under way may still take when it is to end."""
_BOUNDARY = "generation"

OnEnd = Callable[[Stream, CutlayerError | None], None]
"""Told once, when a stream has ended, and with what error if it failed."""


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """What an owner may see of it; holds no text."""

    num_streams: int
    """Streams that decode."""
    num_waiting: int
    """Streams that wait for their turn."""
    num_tokens: int
    """Tokens delivered since the start."""
    tokens_per_s: float
    """Over the last 10 s."""
    num_round_trips: int
    """Calls of the trunk since the start."""
    num_round_trips_saved: int
    """Tokens that came without a round trip of their own, thanks to accepted guesses."""
    bytes_up: int
    """Bytes sent."""
    bytes_down: int
    """Bytes received."""
    num_sessions_replayed: int
    """Times that lost rows were sent again."""
    guarantee: str
    """What the noise promises."""
    num_vectors_released: int
    """Vectors that have left in generation since the run began."""
    num_vectors_replayed: int
    """Vectors that left again, byte for byte, since this process began."""


@dataclass(frozen=True, kw_only=True)
class Meters:
    """Where the status comes from."""

    session: GenerationSession
    traffic: Callable[[], tuple[int, int]]
    """Bytes sent and received."""
    ledger: Callable[[], LedgerSummary]
    guarantee: str


class Engine:
    """Runs until it is closed."""

    def __init__(self, decoder: Decoder, meters: Meters) -> None:
        """Start the thread; the decoder is its own from now on."""
        self._decoder = decoder
        self._meters = meters
        self._changed = threading.Condition()
        self._arrived: deque[tuple[Stream, OnEnd]] = deque()
        self._cancelled: deque[Stream] = deque()
        self._open: list[tuple[Stream, OnEnd]] = []
        self._is_closing = False
        self._counts: deque[tuple[float, int]] = deque()
        self._thread = threading.Thread(target=self._loop, name="generation", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_end: OnEnd = lambda stream, error: None) -> Stream:
        """Take on a request.

        Raises:
            ConfigError: no prompt, or prompt and reply are longer than the context.
            TransportError: the engine is closed.
        """
        stream = self._decoder.new_stream(request)
        with self._changed:
            if self._is_closing:
                raise TransportError("generation has been closed; start it anew")
            self._arrived.append((stream, on_end))
            self._changed.notify()
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a stream at its next turn; one that has ended stays as it is."""
        with self._changed:
            self._cancelled.append(stream)
            self._changed.notify()

    def status(self) -> EngineStatus:
        """Counters now; any thread may ask."""
        decoder, meters = self._decoder, self._meters
        bytes_up, bytes_down = meters.traffic()
        ledger = meters.ledger()
        return EngineStatus(
            num_streams=decoder.num_live,
            num_waiting=decoder.num_waiting + len(self._arrived),
            num_tokens=decoder.num_tokens,
            tokens_per_s=self._tokens_per_s(),
            num_round_trips=meters.session.num_round_trips,
            num_round_trips_saved=decoder.num_saved,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            num_sessions_replayed=meters.session.num_replays,
            guarantee=meters.guarantee,
            num_vectors_released=ledger.num_vectors.get(_BOUNDARY, 0),
            num_vectors_replayed=ledger.num_replayed_vectors,
        )

    def close(self) -> None:
        """Cancel all streams, give the caches back and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            # It waits for a server that is away.
            self._meters.session.interrupt()
            self._thread.join()
            self._meters.session.resume()

    def _loop(self) -> None:
        pause_s: float | None = None
        try:
            while self._wait(pause_s):
                self._take()
                pause_s = self._step()
                self._count()
                self._tell()
        finally:
            # Also where the thread fails: nobody may wait for ever.
            self._is_closing = True
            self._take()
            self._decoder.close()
            self._tell()

    def _step(self) -> float | None:
        try:
            return self._decoder.step()
        except CutlayerError as error:
            self._decoder.fail(error)
        except Exception as error:  # a fault of ours: whoever waits must hear of it
            _log.exception("generation failed inside")
            self._decoder.fail(CutlayerError(f"generation failed inside: {error!r}"))
        return None

    def _wait(self, pause_s: float | None) -> bool:
        """Until there is something to do; False when it is the end."""
        with self._changed:
            while not (self._arrived or self._cancelled or self._is_closing or pause_s == 0):
                self._changed.wait(_TIDY_S if pause_s is None else pause_s)
                if pause_s is not None:
                    break
                self._decoder.tidy()
            return not self._is_closing

    def _take(self) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, deque()
        for stream, on_end in arrived:
            self._open.append((stream, on_end))
            self._decoder.enqueue(stream)
        for stream in cancelled:
            self._decoder.cancel(stream)

    def _tell(self) -> None:
        ended = [(stream, on_end) for stream, on_end in self._open if stream.has_ended]
        self._open = [pair for pair in self._open if not pair[0].has_ended]
        for stream, on_end in ended:
            try:
                on_end(stream, stream.error)
            except Exception:  # a fault of one caller: the others must hear of theirs
                _log.exception("whoever was told of a stream's end failed")

    def _count(self) -> None:
        now_s = time.monotonic()
        self._counts.append((now_s, self._decoder.num_tokens))
        while self._counts[0][0] < now_s - _RATE_S:
            self._counts.popleft()

    def _tokens_per_s(self) -> float:
        counts = list(self._counts)
        now_s = time.monotonic()
        recent = [count for count in counts if count[0] >= now_s - _RATE_S]
        if len(recent) < 2:
            return 0.0
        (first_s, first), (_, last) = recent[0], recent[-1]
        return (last - first) / max(now_s - first_s, 1e-9)
