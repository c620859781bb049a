"""A lost session gets the very bytes again that it had, in every codec."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cutlayer.errors import ConfigError
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary, BoundaryName, Released
from cutlayer.privacy.history import ReleasedHistory
from cutlayer.privacy.run_privacy import RunPrivacy
from cutlayer.wire.codec import CODECS, decode, get_codec

MakeBoundary = Callable[..., Boundary]

D = 40
"""Not a multiple of a codec's group."""


class Session:
    """Releases random vectors for rows of one session and keeps what a server would decode."""

    def __init__(self, boundary: Boundary, num_rows: int) -> None:
        self.boundary = boundary
        self.histories = [ReleasedHistory() for _ in range(num_rows)]
        self.seen = [torch.empty(0, D) for _ in range(num_rows)]
        self._random = torch.Generator().manual_seed(1)

    def step(self, session_rows: list[int], starts: list[int], lengths: list[int]) -> Released:
        rows = Rows(lengths=tuple(lengths), starts=tuple(starts))
        x_ND = torch.randn(rows.num_tokens, D, generator=self._random)
        ids = [f"s-{row}" for row in session_rows]
        _, released = self.boundary.release(x_ND, rows, ids, "base")
        for index, row in enumerate(session_rows):
            self.histories[row].record(released, index)
        parts = decode(released.packed).split(lengths)
        for row, start, part in zip(session_rows, starts, parts, strict=True):
            self.seen[row] = torch.cat([self.seen[row][:start], part])
        return released


@pytest.fixture
def make_session(make_boundary: MakeBoundary) -> Callable[[str, int], Session]:
    def make(codec: str, num_rows: int) -> Session:
        return Session(make_boundary(codec=codec, name=BoundaryName.GENERATION), num_rows)

    return make


MakeSession = Callable[[str, int], Session]


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_vectors_are_coded_one_by_one(codec: str):
    # What slicing bytes rests on; a codec that mixes vectors must fail here.
    x_ND = torch.randn(7, D) * torch.logspace(-3, 3, 7)[:, None]
    whole = get_codec(codec).encode(x_ND)
    alone = [get_codec(codec).encode(x_ND[i : i + 1]) for i in range(7)]
    for index, buffer in enumerate(whole.buffers):
        assert bytes(buffer) == b"".join(bytes(packed.buffers[index]) for packed in alone)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_replay_is_byte_for_byte_what_was_sent(make_session: MakeSession, codec: str):
    session = make_session(codec, 1)
    sent = [session.step([0], [0], [5]), session.step([0], [5], [1]), session.step([0], [6], [1])]
    replay = session.histories[0].replay(7)
    for index, buffer in enumerate(replay.packed.buffers):
        assert bytes(buffer) == b"".join(bytes(r.packed.buffers[index]) for r in sent)
    assert replay.rows == Rows(lengths=(7,))
    assert replay.is_replay
    assert replay.boundary is BoundaryName.GENERATION


def test_a_replay_is_not_in_the_ledger(make_session: MakeSession, run: RunPrivacy):
    session = make_session("fp8", 1)
    session.step([0], [0], [5])
    before = run.ledger.summary()
    session.histories[0].replay(3)
    assert run.ledger.summary() == before


@pytest.mark.parametrize("codec", sorted(CODECS))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_course_of_steps_and_truncations_replays_what_the_server_saw(
    make_session: MakeSession, codec: str, data: st.DataObject
):
    session = make_session(codec, 3)
    for _ in range(data.draw(st.integers(1, 6))):
        rows = sorted(data.draw(st.sets(st.integers(0, 2), min_size=1)))
        starts = [data.draw(st.integers(0, session.histories[row].length)) for row in rows]
        session.step(rows, starts, [data.draw(st.integers(1, 4)) for _ in rows])
    for history, seen in zip(session.histories, session.seen, strict=True):
        assert history.length == len(seen)
        if len(seen):
            length = data.draw(st.integers(1, len(seen)))
            replay = history.replay(length)
            assert replay.rows == Rows(lengths=(length,))
            assert decode(replay.packed).equal(seen[:length])


def test_truncation_cuts_inside_a_piece(make_session: MakeSession):
    session = make_session("int8", 2)
    session.step([0, 1], [0, 0], [5, 2])
    session.histories[0].truncate(3)
    session.histories[1].truncate(9)
    assert [history.length for history in session.histories] == [3, 2]
    assert decode(session.histories[0].replay(3).packed).equal(session.seen[0][:3])


def test_history_does_not_change_with_the_tensor_that_was_sent(make_boundary: MakeBoundary):
    # Raw buffers share the tensor's memory.
    x_ND = torch.ones(2, D)
    boundary = make_boundary("none", name=BoundaryName.GENERATION)
    _, released = boundary.release(x_ND, Rows(lengths=(2,)), ["s"], "base")
    history = ReleasedHistory()
    history.record(released, 0)
    x_ND.zero_()
    assert decode(history.replay(2).packed).equal(torch.ones(2, D))


def test_history_takes_wire_size(make_session: MakeSession):
    session = make_session("fp8", 1)
    session.step([0], [0], [100])
    assert session.histories[0].num_bytes == 100 * (D + 2)


def test_a_gap_is_refused_and_changes_nothing(make_session: MakeSession):
    session = make_session("raw", 1)
    session.step([0], [0], [2])
    with pytest.raises(ConfigError, match="a row starts at 3, kept are 2"):
        session.step([0], [3], [1])
    assert session.histories[0].length == 2


def test_more_than_was_released_cannot_be_replayed(make_session: MakeSession):
    session = make_session("raw", 1)
    with pytest.raises(ConfigError, match="cannot replay 1 vectors: 0"):
        session.histories[0].replay(1)
    session.step([0], [0], [1])
    with pytest.raises(ConfigError, match="cannot replay 2 vectors: 1"):
        session.histories[0].replay(2)
