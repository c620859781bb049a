"""Runs many rows through a generation session together: several rows a call, up to a token limit.

A row is a list of passes: cut the row back, feed some tokens, take the logits after the last of
them. It does not know what the tokens mean, and keeps no logits.

Shapes: K = wanted positions of one pass, V = vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cutlayer.client.session import Feed
from cutlayer.errors import CacheFull

__all__ = ["Pass", "PassLimits", "RowPasses", "Session", "run_passes"]

_LONGEST_WAIT_S = 60.0
_SHORTEST_WAIT_S = 0.05


class Session(Protocol):
    """What is needed of `client.session.GenerationSession`."""

    def open_row(self, max_length: int) -> int:
        """A new row of at most so many tokens."""
        ...

    def close_row(self, row: int) -> None:
        """Give a row's caches back."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on."""
        ...

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Logits after the last tokens of each feed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One stretch of tokens of one row."""

    keep: int
    """Tokens of the row that stay before these are fed."""
    tokens: Sequence[int] = field(repr=False)
    """What is fed, at least one."""
    num_wanted: int
    """Logits are wanted after the last so many of them."""
    deliver: Callable[[int, Tensor], None]
    """Told the place of a wanted position (from 0) and logits_KV from there on, in one or more
    calls; again from the start where the server's memory was short."""


@dataclass(frozen=True, kw_only=True)
class RowPasses:
    """One row, from its first pass to its last."""

    max_length: int
    """Most tokens that it ever holds."""
    passes: Sequence[Pass]


@dataclass(frozen=True, kw_only=True)
class PassLimits:
    """How much goes together."""

    max_tokens: int
    """Tokens of one call of the trunk."""
    max_rows: int
    """Rows at once."""
    piece_tokens: int
    """Longer stretches are cut where a row's length is a multiple of this: an equal text is then
    cut, noised and replayed alike, here and in generation."""


class _Running:
    """A row that has been opened."""

    def __init__(self, session: Session, work: RowPasses) -> None:
        self.work = work
        self.row = session.open_row(work.max_length)
        self.has_fed = False
        self._session = session
        self._left = deque(work.passes)
        self._num_fed = 0

    @property
    def is_done(self) -> bool:
        return not self._left

    def next_feed(self, piece_tokens: int) -> Feed:
        """The next piece of the current pass."""
        current = self._left[0]
        length = current.keep + self._num_fed
        end = self._num_fed + piece_tokens - length % piece_tokens
        piece = current.tokens[self._num_fed : end]
        return Feed(row=self.row, tokens=piece, num_logits=self._num_wanted(len(piece)))

    def cut_back(self) -> None:
        """Forget what the current pass does not keep, before its first piece."""
        if self._num_fed == 0 and self.has_fed:
            self._session.truncate(self.row, self._left[0].keep)

    def take(self, feed: Feed, logits_KV: Tensor) -> None:
        """Deliver what a piece gave, and go on to what follows it."""
        current, num = self._left[0], len(feed.tokens)
        num_wanted = self._num_wanted(num)
        self._num_fed, self.has_fed = self._num_fed + num, True
        if num_wanted:
            first = self._num_fed - num_wanted - (len(current.tokens) - current.num_wanted)
            current.deliver(first, logits_KV)
        if self._num_fed == len(current.tokens):
            self._left.popleft()
            self._num_fed = 0

    def _num_wanted(self, num_tokens: int) -> int:
        """Wanted positions among the next tokens of the current pass."""
        current = self._left[0]
        before = len(current.tokens) - current.num_wanted
        return max(0, min(num_tokens, self._num_fed + num_tokens - before))


def run_passes(
    session: Session,
    rows: Iterable[RowPasses],
    limits: PassLimits,
    on_done: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Run all rows; a row that ends makes room for the next.

    Args:
        session: open, without rows of others that count against the limits.
        rows: in the order in which they begin.
        limits: tokens of a call and rows at once.
        on_done: told after each row that has ended.
        sleep: waits so many seconds.

    Raises:
        CacheFull: the server will never have room for one of the rows, or had none for a minute.
    """
    waiting, running, waited_s = deque(rows), list[_Running](), 0.0
    most = limits.max_rows
    while waiting or running:
        while waiting and len(running) < most:
            running.append(_Running(session, waiting.popleft()))
        try:
            _call(session, running, limits)
        except CacheFull as error:
            most = max(1, len(running) - 1)
            if not _put_back(session, running, waiting):
                waited_s += _wait(error, waited_s, sleep)
            continue
        waited_s = 0.0
        for ended in [row for row in running if row.is_done]:
            session.close_row(ended.row)
            running.remove(ended)
            most = min(most + 1, limits.max_rows)
            on_done()


def _call(session: Session, running: Sequence[_Running], limits: PassLimits) -> None:
    """The next piece of as many rows as fit."""
    fed: list[tuple[_Running, Feed]] = []
    room = limits.max_tokens
    for row in running:
        feed = row.next_feed(min(limits.piece_tokens, limits.max_tokens))
        if len(feed.tokens) <= room:
            room -= len(feed.tokens)
            row.cut_back()
            fed.append((row, feed))
    for (row, feed), logits_KV in zip(fed, session.step([feed for _, feed in fed]), strict=True):
        row.take(feed, logits_KV)


def _put_back(session: Session, running: list[_Running], waiting: deque[RowPasses]) -> bool:
    """The newest row begins again later, best one that has not begun; False if it is alone."""
    if len(running) == 1:
        return False
    last = next((row for row in reversed(running) if not row.has_fed), running[-1])
    running.remove(last)
    session.close_row(last.row)
    waiting.appendleft(last.work)
    return True


def _wait(error: CacheFull, waited_s: float, sleep: Callable[[float], None]) -> float:
    if error.retry_after_s is None or waited_s >= _LONGEST_WAIT_S:
        raise error
    seconds = max(error.retry_after_s, _SHORTEST_WAIT_S)
    sleep(seconds)
    return seconds
