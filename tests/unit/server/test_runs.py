"""What one client may ask of the trunk, and what it costs the others if it asks for more."""

from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, DataError, ProtocolError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.server.batches import TrunkCall, TrunkResult
from cutlayer.server.host import TrunkHost
from cutlayer.server.settings import LimitSettings
from cutlayer.storage.files import private_folder
from cutlayer.storage.vault import NoVault
from cutlayer.wire.messages import Decode, OpenSession
from tests.unit.server.trunk_world import (
    SETTINGS,
    backward_call,
    forward_call,
    opening,
    random_ND,
    tiny_host,
    tiny_trunk,
)

_ROW_BYTES = 2 * 4 * 32


def test_step_that_holds_too_much_is_refused_and_goes_on_without_it(tmp_path: Path) -> None:
    host = tiny_host(tmp_path, max_step_bytes=10 * _ROW_BYTES)
    host.open_run("a", opening())
    host.open_run("b", opening())
    host.forward("a", forward_call([4, 3]), random_ND(7, 0))
    with pytest.raises(ProtocolError, match="max_step_bytes"):
        host.forward("a", forward_call([4], micro=1), random_ND(4, 1))
    host.forward("a", forward_call([3], micro=1), random_ND(3, 1))
    host.forward("a", forward_call([4, 3]), random_ND(7, 0))
    with pytest.raises(ProtocolError, match="max_step_bytes"):
        host.forward("a", forward_call([8], micro=1), random_ND(8, 1))
    host.forward("b", forward_call([10]), random_ND(10, 1))
    host.backward("a", backward_call(micro=1, is_last=False), random_ND(3, 2))
    host.backward("a", backward_call(), random_ND(7, 2))


@pytest.mark.parametrize(("num_before", "too_long"), [(0, 200), (5, 126)])
def test_row_beyond_the_context_costs_the_others_no_call_of_their_own(
    tmp_path: Path, num_before: int, too_long: int
) -> None:
    sizes: list[tuple[int, int]] = []
    host = TrunkHost(
        tiny_trunk(tmp_path),
        LimitSettings(),
        private_folder(tmp_path / "state"),
        NoVault(),
        observe=lambda clients, tokens: sizes.append((clients, tokens)),
    )
    lengths = {"a": 4, "bad": too_long, "c": 3}
    prefix = AdapterSettings(kinds=["prefix"], prefix={"num_virtual_tokens": num_before or 1})
    for owner in lengths:
        has_prefix = owner == "bad" and num_before
        host.open_run(owner, opening(settings=prefix if has_prefix else SETTINGS))
    results = host.run_together(
        [
            TrunkCall(owner=owner, header=forward_call([n]), tensor=random_ND(n, n))
            for owner, n in lengths.items()
        ]
    )
    assert isinstance(results[1], DataError)
    assert all(isinstance(result, TrunkResult) for result in (results[0], results[2]))
    assert sizes == [(2, 7)]
    sessions = {
        owner: host.open_session(owner, OpenSession(max_lengths=[128], run_id="run")).session_id
        for owner in lengths
    }
    results = host.run_together([_decode(o, sessions[o], n) for o, n in lengths.items()])
    assert [isinstance(result, TrunkResult) for result in results] == [True, False, True]
    assert sizes[1:] == [(2, 7)]


def _decode(owner: str, session_id: str, num_tokens: int) -> TrunkCall:
    header = Decode(
        session_id=session_id, rows=[0], lengths=[num_tokens], positions=[0], max_lengths=[]
    )
    return TrunkCall(owner=owner, header=header, tensor=random_ND(num_tokens, 1))


def test_endless_list_of_targets_is_refused_before_it_is_looked_at(tmp_path: Path) -> None:
    targets = [str(number) for number in range(2000)]
    with pytest.raises(ConfigError, match="2000 names"):
        tiny_host(tmp_path).open_run(
            "a", opening(settings=SETTINGS.model_copy(update={"targets": targets}))
        )
