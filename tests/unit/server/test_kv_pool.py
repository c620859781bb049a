"""Bytes of caches: what is counted is what is held, and who gives way to whom."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cutlayer.errors import CacheFull, ProtocolError, SessionLost
from cutlayer.server.kv_pool import KvPool, PooledRow, PoolLimits
from cutlayer.server.sessions import Passage, RowCall, Session, SessionLimits, SessionTable

LAYERS, TOKEN_BYTES = 2, 2 * 2 * 3 * 4
BLOCK = 64 * TOKEN_BYTES
WHOLE = Passage(blocks=range(LAYERS), bytes_per_token=TOKEN_BYTES)


def _fill(row: PooledRow, length: int) -> None:
    new = torch.zeros(1, 1, length, 3)
    for layer in range(LAYERS):
        row.cache.append(layer, new, new)
    row.cache.advance(length)


def _pool(max_blocks: int, max_client_blocks: int) -> KvPool:
    limits = PoolLimits(
        max_bytes=max_blocks * BLOCK, max_client_bytes=max_client_blocks * BLOCK, evict_after_s=1.0
    )
    return KvPool(limits)


def _held(pool: KvPool, owner: str, length: int, now_s: float) -> PooledRow:
    """A row that was used once."""
    row = PooledRow(owner, LAYERS, TOKEN_BYTES, 10_000, now_s)
    pool.admit(owner, {row: length}, now_s)
    _fill(row, length)
    pool.settle([row], now_s)
    return row


def test_only_allocated_blocks_count() -> None:
    pool = _pool(10, 10)
    row = _held(pool, "a", 65, 0.0)
    assert pool.used_bytes == row.cache.nbytes == 2 * BLOCK
    pool.admit("a", {row: 128}, 0.0)
    assert pool.used_bytes == 2 * BLOCK


def test_bytes_of_a_call_that_failed_are_given_back() -> None:
    pool = _pool(10, 10)
    row = PooledRow("a", LAYERS, TOKEN_BYTES, 1000, 0.0)
    pool.admit("a", {row: 300}, 0.0)
    assert pool.used_bytes == 5 * BLOCK
    pool.settle([row], 0.0)
    assert pool.used_bytes == row.cache.nbytes == 0


def test_thousands_of_small_rows_make_room_at_once() -> None:
    num_rows = 20_000
    pool = _pool(num_rows, num_rows)
    rows = {PooledRow(f"many{i % 2}", LAYERS, TOKEN_BYTES, 64, 0.0): 1 for i in range(num_rows)}
    for owner in ("many0", "many1"):
        pool.admit(owner, {row: 1 for row in rows if row.owner == owner}, 0.0)
    for row in rows:
        row.is_busy = False
    began_s = time.process_time()
    new = PooledRow("new", LAYERS, TOKEN_BYTES, num_rows * 64, 2.0)
    pool.admit("new", {new: num_rows // 2 * 64}, 2.0)
    # Every other client's next token waits for this.
    assert time.process_time() - began_s < 1
    assert pool.num_evictions == num_rows // 2
    assert pool.client_bytes("many0") == pool.client_bytes("many1")


def test_least_recently_used_idle_row_of_who_holds_most_gives_way() -> None:
    pool = _pool(6, 6)
    small = _held(pool, "small", 1, 0.0)
    old, newer = _held(pool, "big", 100, 1.0), _held(pool, "big", 100, 2.0)
    _held(pool, "c", 100, 4.0)
    assert [small.num_bytes, old.num_bytes, newer.num_bytes] == [BLOCK, 0, 2 * BLOCK]
    _held(pool, "c", 1, 4.0)
    assert [small.num_bytes, newer.num_bytes, pool.num_evictions] == [BLOCK, 2 * BLOCK, 1]


def test_memory_of_an_evicted_row_is_freed() -> None:
    pool = _pool(1, 1)
    row = _held(pool, "a", 1, 0.0)
    _held(pool, "b", 1, 5.0)
    assert (row.cache.nbytes, row.cache.length) == (0, 0)


def test_client_at_its_own_limit_evicts_only_its_own() -> None:
    pool = _pool(10, 2)
    other, own = _held(pool, "b", 1, 0.0), _held(pool, "a", 100, 1.0)
    _held(pool, "a", 1, 3.0)
    assert (other.num_bytes, own.num_bytes) == (BLOCK, 0)


def test_rows_in_use_or_of_the_call_itself_never_give_way() -> None:
    pool = _pool(3, 3)
    busy, own = PooledRow("b", LAYERS, TOKEN_BYTES, 1000, 0.0), _held(pool, "a", 60, 0.0)
    pool.admit("b", {busy: 100}, 0.0)
    with pytest.raises(CacheFull):
        pool.admit("a", {own: 100}, 50.0)
    assert (busy.num_bytes, own.num_bytes, own.is_busy) == (2 * BLOCK, BLOCK, False)


def test_full_pool_says_when_a_row_may_give_way() -> None:
    pool = _pool(1, 1)
    _held(pool, "a", 1, 10.0)
    with pytest.raises(CacheFull, match="no other row is idle") as full:
        _held(pool, "b", 1, 10.75)
    assert full.value.retry_after_s == pytest.approx(0.25)
    _held(pool, "b", 1, 11.0)


def test_call_that_can_never_fit_is_told_so() -> None:
    with pytest.raises(CacheFull, match="send fewer rows") as full:
        _held(_pool(10, 2), "a", 129, 0.0)
    assert full.value.retry_after_s is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.data())
def test_clients_that_want_more_than_there_is_all_come_to_their_end(
    num_clients: int, data: st.DataObject
) -> None:
    """Every client replays what it lost and asks again; a second passes now and then."""
    pool = _pool(3, 2)
    goals = {f"c{n}": data.draw(st.integers(1, 128)) for n in range(num_clients)}
    rows = {name: PooledRow(name, LAYERS, TOKEN_BYTES, 128, 0.0) for name in goals}
    now_s, rounds = 0.0, 0
    while rows:
        rounds += 1
        assert rounds < 500
        for name in data.draw(st.permutations(sorted(rows))):
            now_s += 0.3
            row, length = rows[name], min(goals[name], rows[name].cache.length + 40)
            try:
                pool.admit(name, {row: length}, now_s)
            except CacheFull:
                continue
            row.cache.truncate(0)
            _fill(row, length)
            pool.settle([row], now_s)
            if length == goals[name]:
                pool.empty(rows.pop(name))
    assert pool.used_bytes == 0


class _Table(RuleBasedStateMachine):
    """Clients do anything at any time; bytes counted are bytes held, and within the budget."""

    def __init__(self) -> None:
        super().__init__()
        limits = SessionLimits(
            max_cache_bytes=6 * BLOCK,
            max_client_cache_bytes=4 * BLOCK,
            max_client_sessions=3,
            max_session_rows=4,
            ttl_s=20.0,
            evict_after_s=1.0,
        )
        self.table = SessionTable(limits, LAYERS)
        self.now_s = 0.0
        self.sessions: list[Session] = []
        self.under_way: list[tuple[Session, RowCall]] = []

    @rule(owner=st.sampled_from("abc"), limits=st.lists(st.integers(1, 200), max_size=3))
    def open(self, owner: str, limits: list[int]) -> None:
        try:
            self.sessions.append(self.table.open(owner, limits, None, WHOLE, self.now_s))
        except CacheFull:
            assert sum(s.owner == owner for s in self.table._sessions.values()) == 3

    @rule(
        pick=st.integers(0, 20),
        wanted=st.dictionaries(
            st.integers(0, 3), st.tuples(st.integers(1, 150), st.integers(0, 90)), min_size=1
        ),
        opens=st.booleans(),
        is_failing=st.booleans(),
        stays=st.booleans(),
    )
    def decode(
        self,
        pick: int,
        wanted: dict[int, tuple[int, int]],
        opens: bool,
        is_failing: bool,
        stays: bool,
    ) -> None:
        if not self.sessions:
            return
        session = self.sessions[pick % len(self.sessions)]
        if any(other is session for other, _ in self.under_way):
            return
        rows = sorted(wanted)
        call = RowCall(
            rows=rows,
            lengths=[wanted[row][0] for row in rows],
            positions=[wanted[row][1] for row in rows],
            max_lengths=[240] * len(rows) if opens else (),
        )
        before = self.table.cache_bytes, self.table.num_rows
        try:
            self.table.admit(session.owner, session.session_id, call, self.now_s)
        except (SessionLost, CacheFull, ProtocolError):
            # Looking for a session may expire some.
            assert self.table.cache_bytes <= before[0]
            assert self.table.num_rows <= before[1]
            return
        for row, length in zip(call.rows, call.lengths, strict=True):
            _fill(session.rows[row], length // 2 + 1 if is_failing else length)
        self.under_way.append((session, call))
        if not stays:
            self.settle()

    @rule()
    def settle(self) -> None:
        for session, call in self.under_way:
            self.table.settle(session.owner, session.session_id, call.rows, self.now_s)
        self.under_way.clear()

    @rule(pick=st.integers(0, 20), rows=st.lists(st.integers(0, 3), max_size=2))
    def close(self, pick: int, rows: list[int]) -> None:
        self.settle()
        if self.sessions:
            session = self.sessions[pick % len(self.sessions)]
            held = self.table.cache_bytes
            try:
                freed = self.table.close(session.owner, session.session_id, self.now_s, rows)
            except SessionLost:
                return
            assert held - freed == self.table.cache_bytes

    @rule(seconds=st.floats(0.01, 9.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.table.expire(self.now_s)

    @invariant()
    def bytes_are_real_and_within_budget(self) -> None:
        rows = [row for s in self.table._sessions.values() for row in s.rows.values()]
        held = sum(row.cache.nbytes for row in rows)
        assert held <= self.table.cache_bytes <= 6 * BLOCK
        if not self.under_way:
            assert held == self.table.cache_bytes
        for owner in "abc":
            assert sum(r.num_bytes for r in rows if r.owner == owner) <= 4 * BLOCK


_Table.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestTable = _Table.TestCase
