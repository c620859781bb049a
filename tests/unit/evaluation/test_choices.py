"""Choices through a session: right numbers, nothing fed twice, limits kept, room awaited.

The session here is a stand-in whose logits tell its rows' whole content, so that one token too many
or too few in a row shows; the split model itself is in `tests/parity`.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.client.session import Feed
from cutlayer.errors import CacheFull
from cutlayer.evaluation.choices import ChoiceScores
from cutlayer.evaluation.passes import PassLimits, run_passes
from cutlayer.evaluation.rows import ChoiceRow
from cutlayer.evaluation.tasks import ChoiceItem, Prompt

V = 11
WIDE = PassLimits(max_tokens=1000, max_rows=100, piece_tokens=256)

Tokens = tuple[int, ...]


def logits_after(tokens: Sequence[int]) -> Tensor:
    """A model that remembers everything."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**60)
    return torch.randn(V, generator=generator)


def expected(row: ChoiceRow) -> list[float]:
    sums = []
    for choice in row.choices:
        whole = row.context + choice
        sums.append(
            sum(
                float(torch.log_softmax(logits_after(whole[:place]), -1)[whole[place]])
                for place in range(len(row.context), len(whole))
            )
        )
    return sums


class StandIn:
    """Rows of tokens; it notes every call and can be out of memory."""

    def __init__(self, room: Sequence[int] = (), retry_after_s: float | None = None) -> None:
        """
        Args:
            room: tokens that all rows together may have, call by call; afterwards no limit.
            retry_after_s: what it says when it is full.
        """
        self._retry_after_s = retry_after_s
        self.rows: dict[int, list[int]] = {}
        self.max_lengths: dict[int, int] = {}
        self.calls: list[int] = []
        self.pieces: list[tuple[int, int]] = []
        self.most_rows = self.num_opened = 0
        self._room = list(room)

    def open_row(self, max_length: int) -> int:
        self.num_opened += 1
        self.rows[self.num_opened] = []
        self.max_lengths[self.num_opened] = max_length
        self.most_rows = max(self.most_rows, len(self.rows))
        return self.num_opened

    def close_row(self, row: int) -> None:
        del self.rows[row]

    def truncate(self, row: int, length: int) -> None:
        assert length <= len(self.rows[row])
        del self.rows[row][length:]

    def step(self, feeds: Sequence[Feed]) -> list[Tensor]:
        assert len({feed.row for feed in feeds}) == len(feeds) > 0
        assert all(0 <= feed.num_logits <= len(feed.tokens) > 0 for feed in feeds)
        num_tokens = sum(len(feed.tokens) for feed in feeds)
        room = self._room.pop(0) if self._room else 10**9
        if sum(map(len, self.rows.values())) + num_tokens > room:
            error = CacheFull("no room")
            error.retry_after_s = self._retry_after_s
            raise error
        self.calls.append(num_tokens)
        return [self._logits(feed) for feed in feeds]

    def _logits(self, feed: Feed) -> Tensor:
        row = self.rows[feed.row]
        self.pieces.append((len(row), len(row) + len(feed.tokens)))
        row.extend(feed.tokens)
        assert len(row) <= self.max_lengths[feed.row]
        ends = range(len(row) - feed.num_logits + 1, len(row) + 1)
        return torch.stack([logits_after(row[:end]) for end in ends] or [torch.empty(V)])[
            : feed.num_logits
        ]


def row(context: Tokens, *choices: Tokens) -> ChoiceRow:
    item = ChoiceItem(where="f:1", prompt=Prompt(text="x"), choices=("x", "y"), answer=0)
    return ChoiceRow(item=item, context=context, choices=choices)


ROWS = [
    row((1, 2, 3), (4,), (5,)),
    row((1,), (4, 5, 6), (4, 5), (4, 7, 8, 9), (3,)),
    row((9, 8, 7, 6, 5, 4), (1, 1, 1), (1, 1, 2), (2, 1)),
    row((2, 2), (3, 3), (3, 3)),
]


def scored(rows: Sequence[ChoiceRow], session: StandIn, limits: PassLimits) -> list[list[float]]:
    scores = [ChoiceScores(row) for row in rows]
    run_passes(session, [score.work() for score in scores], limits, sleep=lambda s: None)
    return [score.log_likelihoods for score in scores]


@pytest.mark.parametrize("piece_tokens", [1, 3, 256])
@pytest.mark.parametrize("max_rows", [1, 2, 100])
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 1000])
def test_log_likelihoods_are_right_at_any_limit(
    max_tokens: int, max_rows: int, piece_tokens: int
) -> None:
    session = StandIn()
    limits = PassLimits(max_tokens=max_tokens, max_rows=max_rows, piece_tokens=piece_tokens)
    assert scored(ROWS, session, limits) == [expected(row) for row in ROWS]
    assert max(session.calls) <= max_tokens
    assert session.most_rows <= max_rows
    assert not session.rows


_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@given(
    st.lists(st.tuples(_tokens, st.lists(_tokens, min_size=2, max_size=5)), max_size=4),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_any_items_are_scored_right(
    items: list[tuple[Tokens, list[Tokens]]], max_tokens: int, max_rows: int
) -> None:
    rows = [row(context, *choices) for context, choices in items]
    limits = PassLimits(max_tokens=max_tokens, max_rows=max_rows, piece_tokens=3)
    assert scored(rows, StandIn(), limits) == [expected(row) for row in rows]


@pytest.mark.parametrize("one", ROWS)
def test_every_beginning_is_fed_once_and_no_last_token_at_all(one: ChoiceRow) -> None:
    session = StandIn()
    scored([one], session, WIDE)
    beginnings = {choice[:n] for choice in one.choices for n in range(1, len(choice))}
    assert sum(session.calls) == len(one.context) + len(beginnings)


def test_rows_go_together() -> None:
    session = StandIn()
    scored([ROWS[0]] * 50, session, WIDE)
    assert session.calls == [150]


def test_a_long_context_is_cut_at_the_same_places_whatever_goes_with_it() -> None:
    long = row(tuple(range(1, 11)) * 2, (1,), (2,))
    cuts = []
    for company in ([], ROWS, ROWS * 3):
        session = StandIn()
        scored([*company, long], session, PassLimits(max_tokens=9, max_rows=100, piece_tokens=8))
        cuts.append([piece for piece in session.pieces if piece[0] >= 8])
    assert cuts == [[(8, 16), (16, 20)]] * 3


def test_single_token_choices_cost_one_call_each() -> None:
    session = StandIn()
    scored([ROWS[0]] * 7, session, PassLimits(max_tokens=1000, max_rows=2, piece_tokens=9))
    assert session.calls == [6, 6, 6, 3]


def test_a_server_without_room_gets_fewer_rows_and_the_numbers_stay_right() -> None:
    session = StandIn(room=[9, 9, 9, 9, 9, 12, 12, 15, 12, 9, 20, 9, 9, 12, 12, 12, 9, 9, 9])
    limits = PassLimits(max_tokens=16, max_rows=100, piece_tokens=4)
    assert scored(ROWS * 2, session, limits) == [expected(row) for row in ROWS * 2]
    assert session.num_opened > 2 * len(ROWS)
    assert not session.rows


@pytest.mark.parametrize(("retry_after_s", "expected_s"), [(1.0, 60), (0.0, 60), (None, 0)])
def test_a_server_that_stays_full_ends_it(retry_after_s: float | None, expected_s: float) -> None:
    waits: list[float] = []
    session = StandIn(room=[0] * 10_000, retry_after_s=retry_after_s)
    with pytest.raises(CacheFull):
        run_passes(session, [ChoiceScores(ROWS[0]).work()], WIDE, sleep=waits.append)
    assert expected_s <= sum(waits) <= expected_s + 1


def test_each_row_is_reported_when_it_has_ended() -> None:
    done: list[int] = []
    session = StandIn()
    run_passes(
        session,
        [ChoiceScores(row).work() for row in ROWS],
        PassLimits(max_tokens=1000, max_rows=1, piece_tokens=9),
        on_done=lambda: done.append(len(session.calls)),
    )
    assert len(done) == len(ROWS)
    assert done == sorted(done)
