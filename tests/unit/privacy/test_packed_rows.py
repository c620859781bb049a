"""Cutting and joining encoded vectors equals encoding the cut and joined ones."""

import pytest
import torch

from cutlayer.privacy.packed_rows import concatenated, sliced
from cutlayer.wire.codec import CODECS, Packed, decode, get_codec

WIDTH = 40
"""Not a multiple of a codec's group."""


def encoded(codec: str, num_vectors: int = 7) -> tuple[torch.Tensor, Packed]:
    x_ND = torch.randn(num_vectors, WIDTH, generator=torch.Generator().manual_seed(0))
    return x_ND, get_codec(codec).encode(x_ND)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize(("begin", "end"), [(0, 7), (0, 1), (2, 5), (6, 7)])
def test_a_slice_has_the_bytes_of_its_vectors_encoded_alone(
    codec: str, begin: int, end: int
) -> None:
    x_ND, packed = encoded(codec)
    part = sliced(packed, begin, end)
    alone = get_codec(codec).encode(x_ND[begin:end])
    assert [bytes(b) for b in part.buffers] == [bytes(b) for b in alone.buffers]
    assert (part.shape, part.dtype) == (alone.shape, alone.dtype)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_slices_joined_again_are_the_whole(codec: str) -> None:
    _, packed = encoded(codec)
    joined = concatenated([sliced(packed, 0, 3), sliced(packed, 3, 4), sliced(packed, 4, 7)])
    assert decode(joined).equal(decode(packed))
    assert joined.shape == packed.shape


def test_pieces_of_different_codecs_are_never_joined() -> None:
    with pytest.raises(AssertionError, match="different form"):
        concatenated([encoded("raw")[1], encoded("fp8")[1]])
