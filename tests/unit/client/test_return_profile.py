"""What a profile of the trunk's replies notices, and what it lets pass."""

import pytest
import torch
from torch import Tensor

from cutlayer.client.return_profile import Echoes, OutputWatch
from cutlayer.wire.codec import decode, encode


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


@pytest.mark.parametrize("factor", [1.0, -1.0, 1.2])
def test_a_single_vector_is_known_by_direction_and_size(factor: float) -> None:
    one, echoes = _vectors(0, 1), Echoes()
    assert not echoes.is_echo(one, _trunk(one))
    assert echoes.is_echo(factor * one, _trunk(one)) is (factor != 1.0)
    assert echoes.is_echo(_vectors(1, 1), _trunk(one))


@pytest.mark.parametrize("codec", ["raw", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_what_a_codec_makes_of_last_bits_is_no_other_call(codec: str, count: int) -> None:
    for seed in range(40):
        jitter = 1 + 2**-9 * (torch.rand(count, 32, generator=torch.Generator().manual_seed(seed)))
        one = _vectors(seed, count)
        echoes = Echoes()
        assert not echoes.is_echo(decode(encode(one, codec)).float(), _trunk(one))
        assert not echoes.is_echo(decode(encode(one * jitter, codec)).float(), _trunk(one))


def test_vectors_too_large_for_a_norm_are_still_told_apart() -> None:
    one, echoes = 1e30 * _vectors(0, 1), Echoes()
    assert not echoes.is_echo(one, _trunk(_vectors(0, 1)))
    assert echoes.is_echo(1e30 * _vectors(1, 1), _trunk(_vectors(0, 1)))
