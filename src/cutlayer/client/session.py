"""One way through the cut: tokens of some rows up, logits of the very same rows back.

Every row has a KV cache on each part; what is done where the trunk loses its own is in `far_rows`.
It does not choose tokens (`sampling`), decide what runs together (`decoder`), or know text.

Shapes: B = rows of a call, N = new tokens of all rows of a call, D = hidden size, V = vocabulary,
S = places whose logits are wanted.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.client.cached_row import CachedRow, Feed
from cutlayer.client.draft_parts import DraftParts
from cutlayer.client.far_rows import FarCall
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.errors import ProtocolError
from cutlayer.model.denoiser import Passed, denoised
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Head, Tail
from cutlayer.model.rows import Rows, pack
from cutlayer.privacy.boundary import Boundary, Released
from cutlayer.privacy.budget import SessionBudget

__all__ = ["Feed", "GenerationSession", "Pending", "SplitModel"]

_MOST_AHEAD = 64
"""Vectors that a crash may leave counted although they never left."""
_ROW_NAME = "row"
"""Rows are named alike: an equal prompt is then a replay, whichever row it is in."""


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """What generation needs: the client's parts, the far trunk and the gate between them."""

    head: Head
    tail: Tail
    trunk: RemoteTrunk
    boundary: Boundary
    run_id: str | None
    """Whose trunk adapter the server uses; None is the base model."""
    step: int | None
    """Which saved step of that run."""
    max_session_vectors: int | None = None
    """Vectors that one conversation may release."""
    drafting: DraftParts | None = None
    """What drafters use beside the text; it learns from what passes by."""
    guarantee: str | None = None
    """What the noise promises, where the boundary is not the only gate on the way."""

    @property
    def version(self) -> str:
        """Identifier of the weights that make the released vectors."""
        return "base" if self.step is None else f"step{self.step}"


@dataclass(kw_only=True)
class Pending:
    """A call of the trunk under way."""

    feeds: tuple[Feed, ...]
    passed: Passed
    """What was released, and what it was before the gate."""
    released: Released
    call: FarCall


class GenerationSession:
    """Rows that come and go; each survives a server that loses its cache."""

    def __init__(self, model: SplitModel) -> None:
        """Nothing is sent before the first call."""
        self._model = model
        self._rows: dict[int, CachedRow] = {}
        self._far = model.trunk.session_rows(model.run_id, model.step, model.version)
        # What is computed together changes the last bits, and other bits would draw other noise.
        self._is_plain = model.boundary.mechanism.label == "none"
        self.num_round_trips = 0
        """Calls of the trunk, replays not counted."""

    @property
    def num_replays(self) -> int:
        """Calls that sent lost rows again."""
        return self._far.num_replays

    def open_row(self, max_length: int) -> int:
        """A new empty row; the server hears of it with its first tokens.

        Args:
            max_length: tokens that it may ever hold.
        """
        row = next(number for number in itertools.count() if number not in self._rows)
        self._rows[row] = CachedRow(
            max_length=max_length,
            head=RowCache(len(self._model.head.block_range), max_length),
            tail=RowCache(len(self._model.tail.block_range), max_length),
            budget=SessionBudget(self._model.max_session_vectors),
            history=self._far.open_row(row, max_length),
        )
        return row

    def begin_conversation(self, row: int) -> None:
        """From now on a new conversation pays, also for what the row has cached already."""
        state = self._rows[row]
        state.budget = SessionBudget(self._model.max_session_vectors)
        state.budget.spend(state.length)
        self._far.begin_conversation(row, state.length)

    def close_row(self, row: int) -> None:
        """Forget a row on all sides."""
        del self._rows[row]
        self._far.close_row(row)

    def length(self, row: int) -> int:
        """Tokens of a row that are cached on all parts."""
        return self._rows[row].length

    def room(self, row: int) -> int:
        """Tokens that a row can still take."""
        return self._rows[row].max_length - self._rows[row].length

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of a row from `length` on; the server follows at the next call."""
        state = self._rows[row]
        state.history.truncate(length)
        state.cut_back()

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        """Feed new tokens of some rows, all in one call of the trunk.

        Returns:
            Per feed the logits [num_logits, V] after its last tokens.

        Raises:
            ConfigError: a row would grow past its limit.
            CacheFull: the server has no room for a row; nothing has changed, ask again later.
            BudgetExceeded: the vectors may not leave; nothing has changed.
        """
        pending = self.begin(feeds)
        of_row = dict(zip([feed.row for feed in pending.feeds], self.finish(pending), strict=True))
        return [of_row[feed.row] for feed in feeds]

    @torch.inference_mode()
    def begin(self, feeds: Sequence[Feed]) -> Pending:
        """Send what `step` sends, without waiting: several may be under way, in order."""
        self._model.trunk.checks.require_trust()
        feeds = tuple(sorted(feeds, key=lambda feed: feed.row))
        rows = [self._rows[feed.row] for feed in feeds]
        for feed, row in zip(feeds, rows, strict=True):
            row.check_room(feed)
            row.cut_back()
        starts = [row.length for row in rows]
        try:
            passed, released = self._release(feeds, rows)
            self.num_round_trips += 1
            wanted = [feed.num_logits for feed in feeds]
            call = self._far.begin(released, [feed.row for feed in feeds], wanted)
        except BaseException:
            self._undo(feeds, starts)
            raise
        pending = Pending(feeds=feeds, passed=passed, released=released, call=call)
        # After a replay the next call is likely to be one, which needs no line.
        if 0 < sum(wanted) <= _MOST_AHEAD and not released.is_replay:
            self._go_ahead(pending, sum(wanted))
        return pending

    @torch.inference_mode()
    def finish(self, pending: Pending) -> list[Tensor]:
        """Wait for a call and go through the tail: logits as of `step`, rows ascending.

        Calls finish in the order in which they began.
        """
        try:
            y_ND = self._far.finish(pending.call)
            logits_SV = self._tail(pending, denoised(self._model.tail, y_ND, pending.passed))
        except BaseException:
            self._undo(pending.feeds, pending.released.rows.starts)
            raise
        drafting = self._model.drafting
        if drafting is not None and drafting.learns:
            drafting.observe(pending.passed.sent_ND, y_ND)
        return list(logits_SV.split([feed.num_logits for feed in pending.feeds]))

    def drop(self, pending: Pending) -> None:
        """Wait for a call whose answer is of no use, as an earlier one has failed."""
        self._far.drop(pending.call)
        self._undo(pending.feeds, pending.released.rows.starts)

    @torch.inference_mode()
    def guess(self, row: int, token: int) -> Tensor:
        """Logits [V] after one more token without the trunk; nothing leaves.

        Args:
            row: its own caches go on with the guess until `forget_guesses` or the next call.
            token: the next token, guessed or not yet fed.
        """
        state, drafting = self._rows[row], self._model.drafting
        packed = pack([[token]], [state.head.length])
        h_ND = self._model.head(packed, [state.head])
        y_ND = h_ND if drafting is None else drafting.skip(h_ND)
        logits_SV: Tensor = self._model.tail(y_ND, packed.without_tokens(), [state.tail])
        return logits_SV[-1]

    def forget_guesses(self, row: int) -> None:
        """Back to what has been released."""
        self._rows[row].cut_back()

    def interrupt(self) -> None:
        """End a wait for a server that is away with TransportError; any thread may call it."""
        self._model.trunk.interrupt()

    def resume(self) -> None:
        """Wait for the server again."""
        self._model.trunk.resume()

    def close(self) -> None:
        """Give the server's caches back."""
        self._rows.clear()
        self._far.close()

    def _go_ahead(self, pending: Pending, num_vectors: int) -> None:
        """The disk works while the server does."""
        try:
            self._model.boundary.go_ahead(num_vectors, self._model.version)
        except BaseException:
            self.drop(pending)
            raise

    def _release(self, feeds: Sequence[Feed], rows: Sequence[CachedRow]) -> tuple[Passed, Released]:
        """Through head and gate; with noise each piece by itself."""
        pieces = [[feed.tokens] if self._is_plain else feed.pieces() for feed in feeds]
        tokens = [piece for row in pieces for piece in row]
        states = [row for row, own in zip(rows, pieces, strict=True) for _ in own]
        starts = [
            row.length + begin
            for row, own in zip(rows, pieces, strict=True)
            for begin in itertools.accumulate(map(len, own[:-1]), initial=0)
        ]
        packed = pack(tokens, starts)
        h_ND = self._head(packed, [row.head for row in states])
        sent_ND, released = self._model.boundary.release(
            h_ND,
            packed,
            [_ROW_NAME] * len(states),
            self._model.version,
            [row.budget for row in states],
        )
        return Passed(h_ND=h_ND, sent_ND=sent_ND), released.merged([len(own) for own in pieces])

    def _head(self, packed: Rows, caches: Sequence[RowCache]) -> Tensor:
        if self._is_plain:
            h_ND: Tensor = self._model.head(packed, caches)
            return h_ND
        assert packed.tokens_N is not None
        parts = packed.tokens_N.split(packed.lengths)
        alone = [
            Rows(lengths=(len(part_n),), starts=(start,), tokens_N=part_n)
            for part_n, start in zip(parts, packed.starts, strict=True)
        ]
        return torch.cat([self._model.head(r, [c]) for r, c in zip(alone, caches, strict=True)])

    def _tail(self, pending: Pending, y_ND: Tensor) -> Tensor:
        """Logits [S, V] of all places that are wanted."""
        layout = pending.released.rows
        caches = [self._rows[feed.row].tail for feed in pending.feeds]
        select_S = torch.tensor(_last_places(pending.feeds, layout), dtype=torch.int64)
        logits_SV: Tensor = self._model.tail(y_ND, layout, caches, select_S)
        if not bool(torch.isfinite(logits_SV).all()):
            raise ProtocolError("the trunk's output gives logits that are not finite")
        return logits_SV

    def _undo(self, feeds: Sequence[Feed], starts: Sequence[int]) -> None:
        """As before the call that failed; its vectors count as released if they left."""
        for feed, start in zip(feeds, starts, strict=True):
            row = self._rows[feed.row]
            row.history.truncate(min(start, row.length))
            row.cut_back()


def _last_places(feeds: Sequence[Feed], layout: Rows) -> list[int]:
    """Places in the packed order whose logits are wanted."""
    ends = layout.offsets[1:]
    return [
        place
        for feed, end in zip(feeds, ends, strict=True)
        for place in range(end - feed.num_logits, end)
    ]
