"""Streams that generate together: a turn is one call of the trunk for all of them.

It does not compute (`session`), choose tokens (`sampling`, `verification`), guess (`drafting`) or
know text, and it has no thread of its own (`engine`).

Shapes: V = vocabulary, k = drafted tokens of a stream.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from cutlayer.client.cached_row import Feed
from cutlayer.client.draft_length import DraftLength
from cutlayer.client.drafting import Draft, DraftWorld, make_drafter
from cutlayer.client.kept_rows import KeptRows
from cutlayer.client.live_stream import NO_DRAFT, LiveStream, new_token
from cutlayer.client.sampling import RowSampler
from cutlayer.client.session import GenerationSession, Pending
from cutlayer.client.settings import GenerationSettings
from cutlayer.client.streams import Finish, Request, Stream
from cutlayer.client.verification import verify
from cutlayer.errors import BudgetExceeded, CacheFull, ConfigError, CutlayerError, SessionLost

__all__ = ["Decoder", "MakeWorld"]

_MAX_CACHE_WAIT_S = 60.0
"""How long a stream asks for room at the server."""
_LEAST_RETRY_S, _MOST_RETRY_S = 0.02, 5.0
_IN_FLIGHT, _MAX_PIECES = 2, 4
_REFUSALS = (BudgetExceeded, CacheFull, SessionLost)
"""What ends or delays a stream and no other."""

MakeWorld = Callable[[GenerationSession, int, Request], DraftWorld]
"""What the drafter of a request in a session's row may use."""


class Decoder:
    """Takes turns; used from one thread."""

    def __init__(
        self,
        session: GenerationSession,
        settings: GenerationSettings,
        context_length: int,
        make_world: MakeWorld,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            session: its rows belong to this decoder from now on.
            settings: how streams share.
            context_length: tokens of a row at most.
            make_world: for the drafter of each stream.
            clock: seconds, also of the requests' deadlines.
        """
        self._session = session
        self._settings = settings
        self._context_length = context_length
        self._make_world = make_world
        self._clock = clock
        self._waiting: deque[Stream] = deque()
        self._live: list[LiveStream] = []
        self._kept = KeptRows(session, settings.keep_rows, settings.keep_s, clock)
        self.num_tokens = 0
        """Tokens delivered by all streams."""
        self.num_saved = 0
        """Round trips that accepted drafts have spared."""

    @property
    def num_live(self) -> int:
        """Streams that have a row."""
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        """Streams that wait for one."""
        return len(self._waiting)

    def new_stream(self, request: Request) -> Stream:
        """A stream that `enqueue` takes; any thread may ask for one.

        Raises:
            ConfigError: no prompt, or prompt and reply are longer than the context.
        """
        wanted = len(request.prompt) + request.sampling.max_new_tokens
        if not request.prompt or wanted > self._context_length:
            raise ConfigError(
                f"a row of {wanted} tokens, prompt and reply together, in a context of "
                f"{self._context_length}; give a prompt, or lower sampling.max_new_tokens"
            )
        return Stream(request=request)

    def enqueue(self, stream: Stream) -> None:
        """Take on a new stream."""
        self._waiting.append(stream)

    def add(self, request: Request) -> Stream:
        """Take on a request; see `new_stream`."""
        stream = self.new_stream(request)
        self.enqueue(stream)
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a stream now; nothing more of it leaves."""
        self._end(stream, Finish.CANCELLED)

    def step(self) -> float | None:
        """One turn.

        Returns:
            Seconds until the next can do something, 0 for at once; None when all streams have
            ended.

        Raises:
            TransportError: the server stayed away; the streams are as before the turn.
        """
        self._end_late()
        self._admit()
        now_s = self._clock()
        ready = [live for live in self._live if live.ready_s <= now_s]
        if not ready:
            return self._pause(now_s)
        if len(ready) == 1 and self._num_unfed(ready[0]) > self._settings.prefill_tokens:
            self._feed_long(ready[0])
        else:
            self._turn(ready)
        return 0.0 if self._live or self._waiting else None

    def tidy(self) -> None:
        """Close kept rows whose time is up; for whoever has long taken no turn."""
        self._kept.expire()

    def finish(self, streams: Sequence[Stream]) -> None:
        """Take turns until these have ended.

        Raises:
            CutlayerError: what the first of them failed with.
        """
        while any(not stream.has_ended for stream in streams):
            pause_s = self.step()
            if pause_s:
                time.sleep(pause_s)
        for stream in streams:
            if stream.error is not None:
                raise stream.error

    def fail(self, error: CutlayerError) -> None:
        """End every stream with this error."""
        for stream in self._streams():
            stream.error = error
            self._end(stream, Finish.ERROR)

    def close(self) -> None:
        """End all streams and give the caches back."""
        for stream in self._streams():
            self.cancel(stream)
        self._session.close()

    def _admit(self) -> None:
        self._kept.expire()
        while self._waiting and len(self._live) < self._settings.max_streams:
            stream = self._waiting.popleft()
            row, stream.num_cached = self._kept.take(stream.request.prompt)
            if row is None:
                row = self._session.open_row(self._context_length)
            try:
                self._live.append(self._new_live(stream, row))
            except BaseException:
                # It is still one of those that hear of the error.
                self._session.close_row(row)
                self._waiting.appendleft(stream)
                raise

    def _new_live(self, stream: Stream, row: int) -> LiveStream:
        settings, request = self._settings.speculation, stream.request
        return LiveStream(
            stream=stream,
            row=row,
            tokens=list(request.prompt),
            sampler=RowSampler(request.sampling, request.draw),
            drafter=make_drafter(settings, self._make_world(self._session, row, request)),
            draft_length=DraftLength(settings.max_tokens),
        )

    def _turn(self, ready: Sequence[LiveStream]) -> None:
        """All that decode and a piece of what is still to be read, in one call."""
        began_s = self._clock()
        feeds = self._feeds(ready)
        has_prompts = any(self._num_unfed(live) > 1 for live, _ in feeds)
        found = self._run(feeds)
        # What a prompt's piece took tells nothing of what guesses cost.
        seconds = None if has_prompts else self._clock() - began_s
        for live, logits_SV in found:
            if len(logits_SV):
                self._advance(live, logits_SV, seconds)

    def _feeds(self, ready: Sequence[LiveStream]) -> list[tuple[LiveStream, Feed]]:
        feeds, room = [], self._settings.prefill_tokens
        for live in ready:
            num_unfed = self._num_unfed(live)
            if num_unfed > 1 and room < min(num_unfed, self._settings.prefill_tokens):
                continue
            feed = self._next_feed(live, len(ready))
            room -= len(feed.tokens) if num_unfed > 1 else 0
            feeds.append((live, feed))
        return feeds

    def _num_unfed(self, live: LiveStream) -> int:
        return len(live.tokens) - self._session.length(live.row)

    def _next_feed(self, live: LiveStream, num_streams: int) -> Feed:
        """The next piece of what was not fed yet; the last one carries the guesses."""
        begin = self._session.length(live.row)
        # Pieces end at fixed places: an equal prompt is then cut, noised and replayed alike.
        size = self._settings.prefill_tokens
        end = min((begin // size + 1) * size, len(live.tokens))
        live.draft = NO_DRAFT
        if end < len(live.tokens):
            return Feed(row=live.row, tokens=live.tokens[begin:end], num_logits=0)
        # While more than one token is unread, a drafter's own caches do not stand where it guesses.
        live.draft = self._draft(live, num_streams) if end - begin == 1 else NO_DRAFT
        tokens = [*live.tokens[begin:end], *live.draft.tokens]
        return Feed(row=live.row, tokens=tokens, num_logits=1 + len(live.draft.tokens))

    def _draft(self, live: LiveStream, num_streams: int) -> Draft:
        request = live.stream.request
        left = request.sampling.max_new_tokens - len(live.stream.tokens) - 1
        wanted = min(live.draft_length.next(num_streams), left)
        return live.drafter.propose(live.tokens, wanted) if wanted > 0 else NO_DRAFT

    def _run(self, feeds: Sequence[tuple[LiveStream, Feed]]) -> list[tuple[LiveStream, Tensor]]:
        """Logits of each that went well; who has no room or no budget does not stop the others."""
        try:
            logits = self._session.step([feed for _, feed in feeds])
        except _REFUSALS as error:
            if len(feeds) > 1:
                return [found for one in feeds for found in self._run([one])]
            live, feed = feeds[0]
            if isinstance(error, BudgetExceeded) and live.draft.tokens:
                # Guesses may be what there is no room for.
                live.draft = NO_DRAFT
                known = feed.tokens[: len(feed.tokens) - feed.num_logits + 1]
                return self._run([(live, replace(feed, tokens=known, num_logits=1))])
            self._refused(live, error)
            return []
        for live, _ in feeds:
            live.give_up_s = None
            live.stream.num_round_trips += 1
        return [(live, part) for (live, _), part in zip(feeds, logits, strict=True)]

    def _feed_long(self, live: LiveStream) -> None:
        """Some pieces of one long prompt, several under way, so that all parts work at once."""
        try:
            self._feed_pieces(live)
            live.give_up_s = None
        except _REFUSALS as error:
            self._refused(live, error)

    def _feed_pieces(self, live: LiveStream) -> None:
        under_way: deque[Pending] = deque()
        size = self._settings.prefill_tokens
        try:
            for _ in range(_MAX_PIECES):
                if self._num_unfed(live) <= size:
                    break
                under_way.append(self._session.begin([self._next_feed(live, 1)]))
                live.stream.num_round_trips += 1
                if len(under_way) > _IN_FLIGHT:
                    self._session.finish(under_way.popleft())
            while under_way:
                self._session.finish(under_way.popleft())
        finally:
            # Left over only where one failed: their answers are of no use.
            for pending in under_way:
                self._session.drop(pending)

    def _refused(self, live: LiveStream, error: CutlayerError) -> None:
        now_s = self._clock()
        if isinstance(error, CacheFull) and error.retry_after_s is not None:
            if live.give_up_s is None:
                live.give_up_s = now_s + _MAX_CACHE_WAIT_S
            if now_s < live.give_up_s:
                # Neither at once nor never, whatever the server says.
                live.ready_s = now_s + min(_MOST_RETRY_S, max(_LEAST_RETRY_S, error.retry_after_s))
                return
        live.stream.error = error
        self._end(live.stream, Finish.ERROR)

    def _advance(self, live: LiveStream, logits_SV: Tensor, seconds: float | None) -> None:
        """Choose tokens, tell who watches, and keep of the caches what was right."""
        draft, stream = live.draft, live.stream
        chosen = verify(logits_SV, draft, live.sampler, live.tokens)
        num_accepted = len(chosen) - 1
        if seconds is not None:
            live.draft_length.observe(len(draft.tokens), num_accepted, seconds)
        stream.num_drafted += len(draft.tokens)
        stream.num_accepted += num_accepted
        self.num_saved += num_accepted
        length = self._session.length(live.row) - len(draft.tokens) + num_accepted
        self._session.truncate(live.row, length)
        for token, logits_V in zip(chosen, logits_SV, strict=False):
            if token in stream.request.eos_ids:
                return self._end(stream, Finish.STOP)
            live.tokens.append(token)
            stream.tokens.append(token)
            self.num_tokens += 1
            if stream.request.watch(new_token(token, logits_V, stream.request.num_top)):
                return self._end(stream, Finish.STOP)
            if len(stream.tokens) >= stream.request.sampling.max_new_tokens:
                return self._end(stream, Finish.LENGTH)
        return None

    def _end(self, stream: Stream, finish: Finish) -> None:
        if stream.has_ended:
            return
        stream.finish = finish
        if stream in self._waiting:
            self._waiting.remove(stream)
        for live in [live for live in self._live if live.stream is stream]:
            self._live.remove(live)
            live.drafter.close()
            self._kept.keep(live.row, live.tokens)

    def _end_late(self) -> None:
        now_s = self._clock()
        for stream in self._streams():
            deadline_s = stream.request.deadline_s
            if deadline_s is not None and now_s >= deadline_s:
                self._end(stream, Finish.DEADLINE)

    def _pause(self, now_s: float) -> float | None:
        if not self._live:
            return None
        ends = [stream.request.deadline_s for stream in self._streams()]
        due = [*(live.ready_s for live in self._live), *(end for end in ends if end is not None)]
        return max(0.001, min(due) - now_s)

    def _streams(self) -> list[Stream]:
        return [*self._waiting, *(live.stream for live in self._live)]
