"""The cuts that the benchmark compares are comparable."""

import pytest

from benchmarks.cuts_world import six_cuts


@pytest.mark.parametrize("num_blocks", [6, 11, 12, 30])
def test_six_different_cuts_leave_clients_as_many_blocks_as_six_equal_ones(num_blocks: int) -> None:
    cuts, equal = six_cuts(num_blocks)
    assert len({(cut.lower, cut.upper) for cut in cuts}) == 6
    at_clients = [num_blocks - len(cut.trunk) for cut in cuts]
    assert sum(at_clients) == 6 * (num_blocks - len(equal.trunk))
    for cut in (*cuts, equal):
        cut.check(num_blocks)
