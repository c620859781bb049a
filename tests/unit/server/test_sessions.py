"""Rows that come and go, expiry, positions and lost rows of generation sessions."""

from collections.abc import Sequence

import pytest
import torch

from cutlayer.errors import CacheFull, ProtocolError, SessionLost
from cutlayer.server.sessions import Passage, RowCall, Session, SessionLimits, SessionTable

TOKEN_BYTES = 2 * 4
WHOLE = Passage(blocks=range(1), bytes_per_token=TOKEN_BYTES)


def _table(**changes: float) -> SessionTable:
    limits: dict[str, float] = {
        "max_cache_bytes": 1000 * TOKEN_BYTES,
        "max_client_cache_bytes": 600 * TOKEN_BYTES,
        "max_client_sessions": 2,
        "max_session_rows": 8,
        "ttl_s": 10.0,
        "evict_after_s": 1.0,
    }
    return SessionTable(
        SessionLimits(**{**limits, **changes}),  # type: ignore[arg-type]
        num_layers=1,
    )


def _call(
    rows: Sequence[int],
    lengths: Sequence[int],
    positions: Sequence[int] | None = None,
    max_lengths: Sequence[int] = (),
) -> RowCall:
    positions = [0] * len(rows) if positions is None else positions
    return RowCall(rows=rows, lengths=lengths, positions=positions, max_lengths=max_lengths)


def _decode(table: SessionTable, session: Session, call: RowCall, now_s: float = 0.0) -> None:
    """Admit, compute and settle one call."""
    table.admit(session.owner, session.session_id, call, now_s)
    for cache, length in zip(session.caches(call.rows), call.lengths, strict=True):
        new = torch.zeros(1, 1, length, 1)
        cache.append(0, new, new)
        cache.advance(length)
    table.settle(session.owner, session.session_id, call.rows, now_s)


def test_session_without_rows_takes_no_memory() -> None:
    table = _table()
    session = table.open("a", [], None, WHOLE, now_s=0)
    assert (table.num_rows, table.cache_bytes) == (0, 0)
    _decode(table, session, _call([3], [5], max_lengths=[500]))
    assert (table.num_rows, table.cache_bytes) == (1, 64 * TOKEN_BYTES)


def test_number_of_sessions_of_one_client_is_limited() -> None:
    table = _table()
    table.open("a", [1], None, WHOLE, now_s=0)
    table.open("a", [1], None, WHOLE, now_s=0)
    with pytest.raises(CacheFull, match="2 sessions"):
        table.open("a", [1], None, WHOLE, now_s=0)


def test_idle_session_expires_and_a_used_one_does_not() -> None:
    table = _table()
    idle = table.open("a", [1], None, WHOLE, now_s=0)
    used = table.open("a", [1], None, WHOLE, now_s=0)
    table.get("a", used.session_id, now_s=8)
    with pytest.raises(SessionLost) as lost:
        table.get("a", idle.session_id, now_s=11)
    assert lost.value.lost_rows == ()
    assert table.get("a", used.session_id, now_s=17) is used


def test_session_with_a_call_under_way_does_not_expire() -> None:
    table = _table()
    session = table.open("a", [100], None, WHOLE, now_s=0)
    table.admit("a", session.session_id, _call([0], [50]), now_s=0)
    assert table.expire(now_s=100) == 0
    table.settle("a", session.session_id, [0], now_s=100)
    assert table.expire(now_s=111) == 1
    assert table.cache_bytes == 0


def test_session_of_another_client_looks_like_none() -> None:
    table = _table()
    session = table.open("a", [1], None, WHOLE, now_s=0)
    with pytest.raises(SessionLost, match="no such session"):
        table.get("b", session.session_id, now_s=0)
    with pytest.raises(SessionLost):
        table.close("b", session.session_id, now_s=0)


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [8], [-1], [0, 8]])
def test_rows_must_be_ascending_and_within_the_limit(rows: list[int]) -> None:
    table = _table()
    session = table.open("a", [5, 5], None, WHOLE, now_s=0)
    with pytest.raises(ProtocolError, match=r"ascending|limits\.max_session_rows"):
        table.admit("a", session.session_id, _call(rows, [1] * len(rows)), now_s=0)


@pytest.mark.parametrize(
    "call",
    [
        _call([0], [1, 1]),
        _call([0], [1], [-1]),
        _call([0], [0]),
        _call([], []),
        _call([0], [1], max_lengths=[1, 1]),
        _call([0], [1], max_lengths=[-1]),
    ],
)
def test_call_that_contradicts_itself_is_refused(call: RowCall) -> None:
    table = _table()
    session = table.open("a", [5], None, WHOLE, now_s=0)
    with pytest.raises(ProtocolError):
        table.admit("a", session.session_id, call, now_s=0)


@pytest.mark.parametrize("max_lengths", [[0], [9]])
def test_number_of_rows_at_opening_is_limited(max_lengths: list[int]) -> None:
    with pytest.raises(ProtocolError):
        _table().open("a", max_lengths * max_lengths[0] or [0], None, WHOLE, now_s=0)


def test_positions_behind_the_caches_name_the_rows_to_replay() -> None:
    table = _table()
    session = table.open("a", [9, 9, 9], None, WHOLE, now_s=0)
    _decode(table, session, _call([0, 1], [3, 3]))
    with pytest.raises(SessionLost) as lost:
        _decode(table, session, _call([0, 1, 2, 5], [1] * 4, [3, 4, 1, 0]))
    assert lost.value.lost_rows == (1, 2, 5)
    assert [session.rows[row].cache.length for row in range(3)] == [3, 3, 0]


def test_rows_are_opened_by_a_call_all_or_none() -> None:
    table = _table()
    session = table.open("a", [], None, WHOLE, now_s=0)
    with pytest.raises(SessionLost) as lost:
        _decode(table, session, _call([0, 1], [3, 3], max_lengths=[9, 0]))
    assert lost.value.lost_rows == (1,)
    with pytest.raises(CacheFull):
        _decode(table, session, _call([0, 1], [3, 900], max_lengths=[9, 900]))
    with pytest.raises(ProtocolError, match="10 tokens of 9"):
        _decode(table, session, _call([0, 1], [3, 10], max_lengths=[9, 9]))
    assert (table.num_rows, table.cache_bytes) == (0, 0)


def test_opening_call_sent_again_changes_nothing() -> None:
    table = _table()
    session = table.open("a", [], None, WHOLE, now_s=0)
    opening = _call([2], [5], max_lengths=[100])
    _decode(table, session, opening)
    cache, before = session.rows[2].cache, table.cache_bytes
    _decode(table, session, opening)
    assert session.rows[2].cache is cache
    assert (cache.length, table.cache_bytes) == (5, before)


def test_row_that_begins_anew_may_have_a_larger_limit() -> None:
    table = _table()
    session = table.open("a", [5], None, WHOLE, now_s=0)
    _decode(table, session, _call([0], [5]))
    _decode(table, session, _call([0], [90], max_lengths=[100]))
    assert session.rows[0].cache.length == 90
    assert table.cache_bytes == session.rows[0].cache.nbytes == 100 * TOKEN_BYTES


def test_closed_rows_give_their_bytes_back_and_unknown_ones_are_no_error() -> None:
    table = _table()
    session = table.open("a", [100, 100, 100], None, WHOLE, now_s=0)
    _decode(table, session, _call([0, 1, 2], [1, 65, 1]))
    assert table.close("a", session.session_id, 0, [1, 7]) == 100 * TOKEN_BYTES
    assert sorted(session.rows) == [0, 2]
    assert table.close("a", session.session_id, 0) == 2 * 64 * TOKEN_BYTES
    assert (table.num_sessions, table.cache_bytes) == (0, 0)


def test_row_cannot_grow_past_its_limit() -> None:
    table = _table()
    session = table.open("a", [5], None, WHOLE, now_s=0)
    with pytest.raises(ProtocolError, match="6 tokens of 5"):
        table.admit("a", session.session_id, _call([0], [6]), now_s=0)


def test_evicted_row_is_lost_and_its_replay_is_admitted() -> None:
    table = _table(max_cache_bytes=128 * TOKEN_BYTES)
    first = table.open("a", [200, 200], None, WHOLE, now_s=0)
    second = table.open("b", [200], None, WHOLE, now_s=0)
    _decode(table, first, _call([0], [10]), now_s=0)
    _decode(table, first, _call([1], [10]), now_s=1.5)
    _decode(table, second, _call([0], [10]), now_s=2)
    assert table.num_evictions == 1
    with pytest.raises(SessionLost) as lost:
        _decode(table, first, _call([0, 1], [1, 1], [10, 10]), now_s=4)
    assert lost.value.lost_rows == (0,)
    _decode(table, first, _call([0, 1], [11, 1], [0, 10]), now_s=4)
    assert second.rows[0].cache.length == 0
