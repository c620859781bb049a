"""One request's streams, from the engine's thread to the event loop.

Tokens become text on the engine's thread: a stop text must end its stream before the next token's
vectors leave. It does not know how an answer looks (`shapes`).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

from cutlayer.api.asks import Ask
from cutlayer.api.engine import ServedModel, TokenEngine
from cutlayer.api.errors import invalid, too_busy
from cutlayer.client.chat import eos_ids
from cutlayer.client.row_text import RowText
from cutlayer.client.streams import NewToken, Request, Stream
from cutlayer.errors import CutlayerError

__all__ = ["End", "Piece", "Places", "Replies", "ScoredToken"]


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """A token with its log-probabilities, and where its text begins in the reply."""

    new: NewToken = field(repr=False)
    offset: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New text of one reply."""

    choice: int
    text: str = field(repr=False)
    tokens: tuple[ScoredToken, ...] = field(default=(), repr=False)
    """Where log-probabilities were asked for."""


@dataclass(frozen=True, kw_only=True)
class End:
    """One reply is over."""

    choice: int
    stream: Stream = field(repr=False)
    error: CutlayerError | None


class Places:
    """How many replies may be under way or wait; used on the event loop alone."""

    def __init__(self, max_replies: int) -> None:
        self._max_replies = max_replies
        self.num_taken = 0
        """Replies under way."""

    def take(self, num_replies: int) -> None:
        """Claim places.

        Raises:
            ApiError: there are not so many now.
        """
        if num_replies > self._max_replies:
            # No wait helps, and clients would ask again and again.
            raise invalid(
                f"{num_replies} replies are asked for at once; this endpoint takes "
                f"{self._max_replies} (api.max_queue)",
                "n",
            )
        if self.num_taken + num_replies > self._max_replies:
            raise too_busy(
                f"{self.num_taken} replies are under way and {num_replies} more are asked for; "
                f"this endpoint takes {self._max_replies} at once (api.max_queue): ask again later"
            )
        self.num_taken += num_replies

    def give(self) -> None:
        """One place is free again."""
        self.num_taken -= 1


class _Choice:
    """One reply, as the engine's thread sees it."""

    def __init__(self, choice: int, replies: "Replies", text: RowText, is_scored: bool) -> None:
        self._choice = choice
        self._replies = replies
        self._text = text
        self._is_scored = is_scored
        self._waiting: list[ScoredToken] = []

    def watch(self, new: NewToken) -> bool:
        """Take a token; True ends the stream."""
        offset = self._text.num_chars
        text = self._text.add(new.token)
        if self._is_scored:
            self._waiting.append(ScoredToken(new=new, offset=offset))
        if text:
            self._tell(text)
        return self._text.is_stopped

    def end(self, stream: Stream, error: CutlayerError | None) -> None:
        """The stream is over."""
        rest = self._text.rest()
        if rest or self._waiting:
            self._tell(rest)
        self._replies.tell(End(choice=self._choice, stream=stream, error=error))

    def _tell(self, text: str) -> None:
        # Tokens of a stop text are not part of the reply.
        length = self._text.num_chars
        is_stopped = self._text.is_stopped
        kept = tuple(t for t in self._waiting if not is_stopped or t.offset < length)
        self._waiting = []
        if text or kept:
            self._replies.tell(Piece(choice=self._choice, text=text, tokens=kept))


class Replies:
    """The streams of one request; made and read on the event loop."""

    def __init__(self, engine: TokenEngine, places: Places) -> None:
        self._engine = engine
        self._places = places
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | End] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._num_open = 0

    def submit(self, ask: Ask, model: ServedModel, deadline_s: float) -> None:
        """Begin all replies.

        Raises:
            ApiError: no places are free.
            CutlayerError: the engine takes no requests.
        """
        self._places.take(ask.num_choices)
        ends = eos_ids(model.tokenizer)
        for choice in range(ask.num_choices):
            text = RowText(model.tokenizer, ask.sampling.stop)
            watcher = _Choice(choice, self, text, ask.num_top is not None)
            request = Request(
                prompt=ask.prompt_of(choice),
                sampling=ask.sampling,
                eos_ids=ends,
                watch=watcher.watch,
                draw=choice,
                num_top=ask.num_top,
                deadline_s=deadline_s,
            )
            try:
                self._streams.append(self._engine.submit(request, watcher.end))
            except CutlayerError:
                for _ in range(choice, ask.num_choices):
                    self._places.give()
                self.cancel()
                raise
            self._num_open += 1

    async def events(self) -> AsyncIterator[list[Piece | End]]:
        """Pieces and ends as they come, all that wait at once, until every reply has ended."""
        num_ended = 0
        while num_ended < len(self._streams):
            ready = [await self._queue.get()]
            while not self._queue.empty():
                ready.append(self._queue.get_nowait())
            num_ended += sum(isinstance(event, End) for event in ready)
            yield ready

    def cancel(self) -> None:
        """End what is still under way; nothing more of it is released."""
        if self._num_open:
            for stream in self._streams:
                if stream.finish is None:
                    self._engine.cancel(stream)

    def tell(self, event: Piece | End) -> None:
        """Hand an event to the event loop, from the engine's thread."""
        # The loop may be gone at the end of the process; then nobody waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrive, event)

    def _arrive(self, event: Piece | End) -> None:
        if isinstance(event, End):
            self._num_open -= 1
            self._places.give()
        self._queue.put_nowait(event)
