"""Rows inside: counted to the byte, forgotten in the right order, never another owner's."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.enclave.row_store import HeldRow, RowSet, RowSettings, RowStore
from cutlayer.errors import CacheFull, SessionLost


def _row(num_tokens: int = 4, num_places: int = 1) -> HeldRow:
    places = tuple(range(num_places))
    return HeldRow(h_LD=torch.zeros(num_tokens, 8), places=places, targets=None)


def _set(owner: str = "a", row_set: str = "run", front: str = "f") -> RowSet:
    return RowSet(owner=owner, row_set=row_set, front=front)


ROW_BYTES = _row().num_bytes


def _store(num_rows: int, num_client_rows: int | None = None) -> RowStore:
    most = (num_client_rows or num_rows) * ROW_BYTES
    return RowStore(RowSettings(max_bytes=num_rows * ROW_BYTES, max_client_bytes=most, ttl_s=1000))


def test_a_row_put_again_takes_no_more_room() -> None:
    store = _store(2)
    assert store.put(_set(), {1: _row(), 2: _row()}, 0.0) == 2 * ROW_BYTES
    assert store.put(_set(), {1: _row(), 2: _row()}, 0.0) == 2 * ROW_BYTES
    assert store.missing(_set(), [1, 2, 3], 0.0) == [3]


def test_an_owners_idle_runs_make_room_and_busy_ones_do_not() -> None:
    store = _store(2)
    store.put(_set(row_set="old"), {1: _row()}, 0.0)
    store.put(_set(row_set="busy"), {1: _row()}, 100.0)
    store.put(_set(row_set="new"), {1: _row()}, 101.0)
    assert store.missing(_set(row_set="old"), [1], 101.0) == [1]
    assert store.missing(_set(row_set="busy"), [1], 101.0) == []
    with pytest.raises(CacheFull, match="raise the limit at the enclave"):
        store.put(_set(row_set="fourth"), {1: _row()}, 102.0)
    assert store.missing(_set(row_set="new"), [1], 102.0) == []


def test_no_owner_drives_out_another() -> None:
    store = _store(2)
    store.put(_set("a"), {1: _row(), 2: _row()}, 0.0)
    with pytest.raises(CacheFull, match="all owners have"):
        store.put(_set("b"), {1: _row()}, 900.0)
    assert store.missing(_set("a"), [1, 2], 900.0) == []


def test_a_refused_put_costs_no_rows() -> None:
    store = _store(2)
    store.put(_set(row_set="old"), {1: _row()}, 0.0)
    store.put(_set("b"), {1: _row()}, 0.0)
    with pytest.raises(CacheFull):
        store.put(_set(row_set="new"), {1: _row(), 2: _row()}, 100.0)
    assert store.missing(_set(row_set="old"), [1], 100.0) == []


def test_rows_that_nobody_used_for_long_block_no_other_owner() -> None:
    store = _store(2)
    store.put(_set("a"), {1: _row(), 2: _row()}, 0.0)
    assert store.put(_set("b"), {1: _row()}, 1001.0) == ROW_BYTES
    assert store.used_bytes == ROW_BYTES


def test_what_nobody_used_for_long_is_forgotten() -> None:
    store = _store(4)
    store.put(_set("a"), {1: _row()}, 0.0)
    store.put(_set("b"), {1: _row()}, 600.0)
    store.sweep(1200.0)
    assert store.used_bytes == store.held_bytes("b") == ROW_BYTES


def test_short_rows_count_for_what_python_spends_on_them() -> None:
    assert _row(1, 0).num_bytes > 512


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from("xy"), st.integers(1, 3), st.integers(1, 9)
        ),
        max_size=30,
    )
)
def test_used_bytes_are_those_of_the_rows_that_are_there(
    puts: list[tuple[str, str, int, int]],
) -> None:
    store = _store(9, 6)
    for number, (owner, row_set, row_id, num_tokens) in enumerate(puts):
        with suppress(CacheFull):
            store.put(_set(owner, row_set), {row_id: _row(num_tokens)}, 30.0 * number)
        for name in "ab":
            held = 0
            for one in "xy":
                for row in range(1, 4):
                    try:
                        (found,) = store.get(_set(name, one), [row], -1.0)
                    except SessionLost:
                        continue
                    held += found.num_bytes
            assert store.held_bytes(name) == held <= 6 * ROW_BYTES
        assert store.used_bytes <= 9 * ROW_BYTES
