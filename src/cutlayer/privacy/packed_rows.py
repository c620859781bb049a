"""Vectors of encoded tensors cut out and joined: their bytes are copied, never decoded.

It makes no `Released` (`boundary`) and knows no codec's form beyond the bytes of one vector.
"""

from collections.abc import Sequence

from cutlayer.wire.codec import Packed, get_codec

__all__ = ["concatenated", "sliced"]


def sliced(packed: Packed, begin: int, end: int) -> Packed:
    """Vectors `begin` to `end` of an encoded tensor [N, D]."""
    sizes = _vector_bytes(packed)
    buffers = tuple(
        bytes(memoryview(buffer)[begin * size : end * size])
        for buffer, size in zip(packed.buffers, sizes, strict=True)
    )
    shape = (end - begin, *packed.shape[1:])
    return Packed(codec=packed.codec, dtype=packed.dtype, shape=shape, buffers=buffers)


def concatenated(pieces: Sequence[Packed]) -> Packed:
    """Encoded tensors [N_i, D] of one codec and dtype as one [sum of N_i, D]."""
    first = pieces[0]
    kinds = {(p.codec, p.dtype, p.shape[1:]) for p in pieces}
    assert len(kinds) == 1, f"pieces of different form: {kinds}"
    buffers = tuple(b"".join(column) for column in zip(*(p.buffers for p in pieces), strict=True))
    shape = (sum(p.shape[0] for p in pieces), *first.shape[1:])
    return Packed(codec=first.codec, dtype=first.dtype, shape=shape, buffers=buffers)


def _vector_bytes(packed: Packed) -> tuple[int, ...]:
    """Bytes of one vector in each buffer: every codec codes each vector alone."""
    return get_codec(packed.codec).layout((1, *packed.shape[1:]), packed.dtype)
