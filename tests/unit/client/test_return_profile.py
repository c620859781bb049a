"""What a profile of the trunk's replies notices, and what it lets pass."""

import pytest
import torch
from torch import Tensor

from cutlayer.client.return_profile import Echoes, OutputWatch


def _vectors(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def _trunk(x_ND: Tensor) -> Tensor:
    return x_ND + x_ND.cumsum(0)


def test_a_replay_is_found_where_calls_begin_and_end_with_the_same_words() -> None:
    ends_2D, watch = _vectors(0, 2), OutputWatch()
    one, two = (torch.cat([ends_2D[:1], _vectors(seed), ends_2D[1:]]) for seed in (1, 2))
    assert watch.fault(one, _trunk(one)) is None
    assert watch.fault(one, _trunk(one)) is None
    assert "a replay" in str(watch.fault(two, _trunk(one)))
    assert watch.fault(two, _trunk(two)) is None


def test_one_other_vector_among_many_is_something_else() -> None:
    one, echoes = _vectors(0, 256), Echoes()
    two = one.clone()
    two[100] = _vectors(1, 1)
    assert not echoes.is_echo(one, _trunk(one))
    assert echoes.is_echo(two, _trunk(one))


def test_a_last_bit_that_a_reply_rounds_away_is_no_replay() -> None:
    one, echoes = _vectors(0), Echoes()
    two = one.clone()
    two[3, 5] *= 1 + 2**-8
    assert not echoes.is_echo(one, _trunk(one))
    assert not echoes.is_echo(two, _trunk(one))


def test_a_token_that_is_sent_again_with_other_last_bits_is_no_replay() -> None:
    """As where it was guessed once and not the second time, and its reply rounded to two bytes."""
    one, echoes = _vectors(0, 1), Echoes()
    assert not echoes.is_echo(one, _trunk(one))
    for place in range(one.shape[1]):
        two = one.clone()
        two[0, place] *= 1 + 2**-8
        assert not echoes.is_echo(two, _trunk(one))


@pytest.mark.parametrize("factor", [1.0, -1.0, 1.1])
def test_a_single_vector_is_known_by_direction_and_size(factor: float) -> None:
    one, echoes = _vectors(0, 1), Echoes()
    assert not echoes.is_echo(one, _trunk(one))
    assert echoes.is_echo(factor * one, _trunk(one)) is (factor != 1.0)
    assert echoes.is_echo(_vectors(1, 1), _trunk(one))
