"""A real engine of the unsplit tiny model, one thread, one token per stream and turn.

What the endpoint does is compared with it; it can be made slow, or fail.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel

from cutlayer.client.sampling import RowSampler
from cutlayer.client.streams import Finish, NewToken, Request, Stream
from cutlayer.errors import CutlayerError

__all__ = ["PlainEngine", "Status"]

OnEnd = Callable[[Stream, CutlayerError | None], None]


@dataclass
class Status:
    """What `/status` shows."""

    num_streams: int = 0
    num_waiting: int = 0
    num_tokens: int = 0
    tokens_per_s: float = 0.0
    num_round_trips: int = 0
    num_round_trips_saved: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    num_sessions_replayed: int = 0
    guarantee: str = "no noise: none"
    num_vectors_released: int = 0
    num_vectors_replayed: int = 0


@dataclass
class _Row:
    stream: Stream
    on_end: OnEnd
    sampler: RowSampler
    cache: DynamicCache = field(default_factory=DynamicCache)
    feed: list[int] = field(default_factory=list)
    is_cancelled: bool = False


class PlainEngine:
    """Streams of one model; `token_s` is the least time of a token."""

    def __init__(self, model: PreTrainedModel, token_s: float = 0.0) -> None:
        self.token_s = token_s
        self.fail: CutlayerError | None = None
        """What every stream ends with, if anything."""
        self.fail_after = 0
        """After so many tokens."""
        self.counts = Status()
        self.most_streams = 0
        self._model = model
        self._rows: list[_Row] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_end: OnEnd) -> Stream:
        """Begin a stream."""
        stream = Stream(request=request)
        row = _Row(stream, on_end, RowSampler(request.sampling, request.draw))
        row.feed = list(request.prompt)
        with self._changed:
            self._rows.append(row)
            self._changed.notify()
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a stream at its next token."""
        with self._changed:
            for row in self._rows:
                row.is_cancelled |= row.stream is stream

    def status(self) -> Status:
        """Counts as of now."""
        self.counts.num_streams = len(self._rows)
        return self.counts

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._is_closed)
                rows = list(self._rows)
            if self._is_closed:
                return
            self.most_streams = max(self.most_streams, len(rows))
            time.sleep(self.token_s)
            for row in rows:
                finish = self._step(row)
                if finish is not None:
                    self._end(row, finish)

    def _end(self, row: _Row, finish: Finish) -> None:
        row.stream.finish = finish
        with self._changed:
            self._rows.remove(row)
        row.on_end(row.stream, row.stream.error)

    def _step(self, row: _Row) -> Finish | None:
        request, stream = row.stream.request, row.stream
        if row.is_cancelled:
            return Finish.CANCELLED
        if request.deadline_s is not None and time.monotonic() > request.deadline_s:
            return Finish.DEADLINE
        if self.fail is not None and len(stream.tokens) >= self.fail_after:
            stream.error = self.fail
            return Finish.ERROR
        new = self._next(row)
        self.counts.num_tokens += 1
        if new.token in request.eos_ids:
            return Finish.STOP
        stream.tokens.append(new.token)
        row.feed = [new.token]
        if request.watch(new):
            return Finish.STOP
        is_full = len(stream.tokens) >= request.sampling.max_new_tokens
        return Finish.LENGTH if is_full else None

    @torch.no_grad()
    def _next(self, row: _Row) -> NewToken:
        request = row.stream.request
        output = self._model(torch.tensor([row.feed]), past_key_values=row.cache, use_cache=True)
        logits_V = output.logits[0, -1]
        token = row.sampler.next_token(logits_V, [*request.prompt, *row.stream.tokens])
        if request.num_top is None:
            return NewToken(token=token)
        logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
        best = torch.topk(logprobs_V, request.num_top)
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return NewToken(token=token, logprob=float(logprobs_V[token]), top=tuple(top))
