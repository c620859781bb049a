"""What one client's open step may hold at the server."""

from pathlib import Path

import pytest

from cutlayer.errors import ProtocolError
from tests.unit.server.trunk_world import backward_call, forward_call, opening, random_ND, tiny_host

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
