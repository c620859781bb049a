"""Chunks and their assembly: plain bytes, no sockets."""

import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import joined, sample_frames

from cutlayer.errors import ProtocolError
from cutlayer.wire import frame
from cutlayer.wire.frame import PRELUDE_BYTES, FrameLimits
from cutlayer.wire.stream import CHUNK_BYTES, Assembler, chunks

FRAMES = [bytes(joined(message)) for message in sample_frames()]


@given(st.lists(st.integers(0, 3 * CHUNK_BYTES // 2), max_size=6))
@settings(deadline=None, max_examples=25)
def test_chunks_keep_every_byte_and_their_size(sizes: list[int]) -> None:
    buffers = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    pieces = list(chunks(buffers))
    assert b"".join(pieces) == b"".join(buffers)
    assert all(len(piece) == CHUNK_BYTES for piece in pieces[:-1])
    assert all(0 < len(piece) <= CHUNK_BYTES for piece in pieces)


@given(st.lists(st.sampled_from(FRAMES), max_size=4), st.data())
@settings(deadline=None)
def test_frames_cut_anywhere_come_back_in_order(wanted: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(wanted)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    assembler = Assembler(FrameLimits())
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += [bytes(whole) for whole in assembler.feed(stream[start:end])]
    assembler.finish()
    assert found == wanted


def test_single_bytes_are_enough() -> None:
    assembler = Assembler(FrameLimits())
    found = [whole for byte in FRAMES[0] for whole in assembler.feed(bytes([byte]))]
    assert [bytes(whole) for whole in found] == FRAMES[:1]


def test_an_assembled_frame_decodes_without_a_copy() -> None:
    (whole,) = Assembler(FrameLimits()).feed(FRAMES[0])
    (packed, *_) = frame.decode(whole).tensors.values()
    assert isinstance(packed.buffers[0], memoryview)
    assert packed.buffers[0].obj is whole.obj
    assert not packed.buffers[0].readonly


def test_an_oversized_frame_is_refused_before_its_body_comes() -> None:
    assembler = Assembler(FrameLimits(max_frame_bytes=64))
    assert list(assembler.feed(FRAMES[0][: PRELUDE_BYTES - 1])) == []
    with pytest.raises(ProtocolError, match="the limit is 64"):
        list(assembler.feed(FRAMES[0][PRELUDE_BYTES - 1 : PRELUDE_BYTES]))


def test_a_claimed_length_takes_no_memory_that_was_not_sent() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prelude = FRAMES[0][:12] + (250 << 20).to_bytes(4, "little")
    waiting = [Assembler(FrameLimits()) for _ in range(4)]
    for assembler in waiting:
        assert list(assembler.feed(prelude)) == []
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 << 20


def test_an_end_inside_a_frame_is_refused_and_between_frames_is_not() -> None:
    assembler = Assembler(FrameLimits())
    assembler.finish()
    list(assembler.feed(FRAMES[0] + FRAMES[1][:30]))
    assert assembler.is_partial
    with pytest.raises(ProtocolError, match="ended inside a frame, after 30"):
        assembler.finish()
