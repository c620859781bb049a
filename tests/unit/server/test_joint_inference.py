"""Generation and evaluation of several clients in one call: as if each were alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.errors import CacheFull, SessionLost
from cutlayer.server.batches import TrunkCall, TrunkResult
from cutlayer.server.host import TrunkHost
from cutlayer.wire.messages import CloseSession, Commit, Decode, Forward, OpenSession
from tests.unit.server.trunk_world import (
    backward_call,
    finished,
    forward_call,
    opening,
    random_ND,
    tiny_host,
)


def _trained_host(tmp_path: Path) -> TrunkHost:
    """Owner a has a trained adapter; b and c use the base model."""
    host = tiny_host(tmp_path)
    host.open_run("a", opening())
    host.forward("a", forward_call([6]), random_ND(6, 0))
    host.backward("a", backward_call(), random_ND(6, 1))
    host.commit("a", Commit(run_id="run", commit=finished(1, 6), save=True, step=1))
    return host


def _sessions(host: TrunkHost) -> dict[str, str]:
    runs = {"a": "run", "b": None, "c": None}
    return {
        owner: host.open_session(owner, OpenSession(max_lengths=[16, 16], run_id=run)).session_id
        for owner, run in runs.items()
    }


def _decode(owner: str, session_id: str, lengths: list[int], positions: list[int]) -> TrunkCall:
    rows = list(range(len(lengths)))
    header = Decode(session_id=session_id, rows=rows, lengths=lengths, positions=positions)
    return TrunkCall(owner=owner, header=header, tensor=random_ND(sum(lengths), ord(owner)))


def _outputs(host: TrunkHost, is_together: bool) -> list[Tensor]:
    sessions, outputs = _sessions(host), []
    for lengths, positions in (([5, 2], [0, 0]), ([1, 1], [5, 2]), ([2, 1], [4, 3])):
        calls = [_decode(o, s, lengths, positions) for o, s in sessions.items()]
        groups = [calls] if is_together else [[call] for call in calls]
        for result in [r for group in groups for r in host.run_together(group)]:
            assert isinstance(result, TrunkResult)
            assert result.tensor is not None
            outputs.append(result.tensor)
    return outputs


def test_tokens_of_several_sessions_in_one_call_equal_each_alone(tmp_path: Path) -> None:
    host = _trained_host(tmp_path)
    pairs = zip(_outputs(host, is_together=True), _outputs(host, is_together=False), strict=True)
    for together, alone in pairs:
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_sessions_cannot_fill_the_memory_with_adapters(tmp_path: Path) -> None:
    host = tiny_host(tmp_path, max_client_adapters=2)
    for name in "xyz":
        host.open_run("a", opening(name))
    host.open_run("b", opening("x"))
    sessions = [host.open_session("a", _opened(name)) for name in "xyx"]
    with pytest.raises(CacheFull, match="use 2 adapters, its limit"):
        host.open_session("a", _opened("z"))
    host.open_session("b", _opened("x"))
    host.close_session("a", CloseSession(session_id=sessions[1].session_id))
    host.open_session("a", _opened("z"))


def _opened(run_id: str) -> OpenSession:
    return OpenSession(max_lengths=[8], run_id=run_id, step=0)


def test_lost_session_in_a_shared_call_is_its_client_s_alone(tmp_path: Path) -> None:
    host = _trained_host(tmp_path)
    sessions = _sessions(host)
    calls = [_decode("a", sessions["a"], [3], [0]), _decode("b", sessions["c"], [3], [0])]
    good, lost = host.run_together(calls)
    assert isinstance(good, TrunkResult)
    assert isinstance(lost, SessionLost)


@pytest.mark.parametrize("owners", ["ab", "a"])
def test_evaluation_changes_nothing_and_leaves_no_graph(tmp_path: Path, owners: str) -> None:
    host = _trained_host(tmp_path)
    host.open_run("b", opening())
    steps = {"a": 1, "b": 0}
    before = host._runs["a", "run"]._adapter.state()
    calls = [
        TrunkCall(
            owner=owner,
            header=Forward(
                run_id="run", step=steps[owner], micro=0, lengths=[4], is_evaluation=True
            ),
            tensor=random_ND(4, 2),
        )
        for owner in owners
    ]
    results = host.run_together(calls)
    alone = [host.run_together([call])[0] for call in calls]
    for result, expected in zip(results, alone, strict=True):
        assert isinstance(result, TrunkResult)
        assert isinstance(expected, TrunkResult)
        torch.testing.assert_close(result.tensor, expected.tensor, rtol=1e-5, atol=1e-5)
    assert host.graph_bytes == 0
    state = host._runs["a", "run"]._adapter.state()
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_call_in_pieces_equals_the_call_at_once(size: int, tmp_path: Path) -> None:
    """Rows of a call with a past, cut anywhere."""
    host = _trained_host(tmp_path)
    outputs = []
    for piece in (10_000, size):
        session_id = host.open_session("a", OpenSession(max_lengths=[], run_id="run")).session_id
        for lengths, positions in (([3, 4], [0, 0]), ([5, 4], [2, 4])):
            header = Decode(
                session_id=session_id,
                rows=[0, 6],
                lengths=lengths,
                positions=positions,
                max_lengths=[32, 32],
            )
            tensor = random_ND(sum(lengths), 3)
            found = []
            for begin in range(0, len(tensor), piece):
                end = min(begin + piece, len(tensor))
                call = TrunkCall(owner="a", header=header, tensor=tensor, begin=begin, end=end)
                (result,) = host.run_together([call])
                assert isinstance(result, TrunkResult)
                assert result.tensor is not None
                found.append(result.tensor)
            outputs.append(torch.cat(found))
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[3], outputs[1], rtol=1e-5, atol=1e-5)


def test_call_given_up_between_its_pieces_leaves_what_the_next_can_use(tmp_path: Path) -> None:
    host = tiny_host(tmp_path)
    session_id = host.open_session("c", OpenSession(max_lengths=[64], run_id=None)).session_id
    tensor = random_ND(20, 3)
    header = Decode(session_id=session_id, rows=[0], lengths=[20], positions=[0])
    host.run_together([TrunkCall(owner="c", header=header, tensor=tensor, end=8)])
    assert host.sessions.expire(1e9) == 0
    host.abandon("c", header)
    rest = Decode(session_id=session_id, rows=[0], lengths=[14], positions=[6])
    continued = host.decode("c", rest, tensor[6:])
    whole = host.decode("c", header, tensor)
    torch.testing.assert_close(continued, whole[6:], rtol=1e-5, atol=1e-5)
    assert host.sessions.expire(1e9) == 1
    assert host.sessions.cache_bytes == 0
