"""Admission, expiry and positions of generation sessions."""

import pytest

from cutlayer.errors import CacheFull, ProtocolError, SessionLost
from cutlayer.server.sessions import SessionLimits, SessionTable


def _table(**changes: float) -> SessionTable:
    limits: dict[str, float] = {
        "max_cache_bytes": 1000,
        "max_client_cache_bytes": 600,
        "max_client_sessions": 2,
        "ttl_s": 10.0,
    }
    return SessionTable(
        SessionLimits(**{**limits, **changes}),  # type: ignore[arg-type]
        bytes_per_token=10,
        num_layers=1,
    )


def test_reserved_bytes_are_admitted_up_to_each_limit_and_no_further() -> None:
    table = _table()
    table.open("a", [30, 30], None, now_s=0)
    with pytest.raises(CacheFull, match="a's quota"):
        table.open("a", [1], None, now_s=0)
    table.open("b", [40], None, now_s=0)
    with pytest.raises(CacheFull, match="ask again later"):
        table.open("c", [1], None, now_s=0)
    assert table.reserved_bytes == 1000


def test_number_of_sessions_of_one_client_is_limited() -> None:
    table = _table()
    table.open("a", [1], None, now_s=0)
    table.open("a", [1], None, now_s=0)
    with pytest.raises(CacheFull, match="2 sessions"):
        table.open("a", [1], None, now_s=0)


def test_idle_session_expires_and_a_used_one_does_not() -> None:
    table = _table()
    idle = table.open("a", [1], None, now_s=0)
    used = table.open("a", [1], None, now_s=0)
    table.get("a", used.session_id, now_s=8)
    with pytest.raises(SessionLost):
        table.get("a", idle.session_id, now_s=11)
    assert table.get("a", used.session_id, now_s=17) is used


def test_session_of_another_client_looks_like_none() -> None:
    table = _table()
    session = table.open("a", [1], None, now_s=0)
    with pytest.raises(SessionLost, match="no such session"):
        table.get("b", session.session_id, now_s=0)
    with pytest.raises(SessionLost):
        table.close("b", session.session_id, now_s=0)


@pytest.mark.parametrize("rows", [[1, 0], [0, 0], [2], [-1]])
def test_rows_must_be_known_and_ascending(rows: list[int]) -> None:
    session = _table().open("a", [5, 5], None, now_s=0)
    with pytest.raises(ProtocolError, match="ascending"):
        session.rows_at(rows, [1] * len(rows), [0] * len(rows))


def test_position_behind_the_cache_asks_for_a_replay() -> None:
    session = _table().open("a", [5], None, now_s=0)
    with pytest.raises(SessionLost, match="0 tokens cached"):
        session.rows_at([0], [1], [3])


def test_row_cannot_grow_past_its_limit() -> None:
    session = _table().open("a", [5], None, now_s=0)
    with pytest.raises(ProtocolError, match="6 tokens of 5"):
        session.rows_at([0], [6], [0])
