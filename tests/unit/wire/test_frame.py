"""The frame format: round trips, golden bytes, refusals."""

import re
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import joined, sample_frames

from cutlayer.errors import ProtocolError
from cutlayer.wire import codec, frame
from cutlayer.wire.frame import Frame, FrameLimits, read_prelude
from cutlayer.wire.messages import HEADERS, Decode, Decoded, Forward, Header, Hello, Kind, Step
from cutlayer.wire.packed import Packed

GOLDEN = Path(__file__).parents[2] / "data" / "decode.frame"
DOCS = Path(__file__).parents[3] / "docs" / "wire.md"
PRELUDE = struct.Struct("<2sBBIII")


def golden_frame() -> Frame:
    """The worked example of docs/wire.md."""
    h = codec.encode(torch.tensor([[1.0, -2.0, 0.5]]), "bf16")
    header = Decode(session_id="s1", rows=[0], lengths=[1], positions=[300])
    return Frame(Kind.DECODE, header, {"h": h}, call_id=7)


def contents(message: Frame) -> tuple[object, ...]:
    tensors = {
        name: (packed.codec, packed.dtype, packed.shape, [bytes(b) for b in packed.buffers])
        for name, packed in message.tensors.items()
    }
    return message.kind, message.header, tensors, message.call_id, message.version


def with_prelude(data: bytearray, index: int, value: object) -> bytearray:
    fields = list(PRELUDE.unpack_from(data))
    fields[index] = value
    return bytearray(PRELUDE.pack(*fields)) + data[PRELUDE.size :]


def with_table(entries: list[list[object]], body: bytes = b"") -> bytearray:
    """A DECODED frame whose tensor table is `entries`."""
    header = msgspec.msgpack.encode([[], entries])
    data = PRELUDE.pack(b"CL", 2, Kind.DECODED, 1, len(header), len(body)) + header
    return bytearray(data + bytes(-len(data) % 8) + body)


small_ints = st.integers(0, 2**31)
texts = st.text(max_size=20)
tables = st.dictionaries(texts, st.one_of(texts, small_ints), max_size=5)
steps = st.builds(
    Step,
    step=small_ints,
    client_sq_norm=st.floats(allow_nan=False),
    num_tokens=small_ints,
    lr=st.floats(0, 1),
)
headers: st.SearchStrategy[tuple[Kind, Header]] = st.one_of(
    st.tuples(
        st.just(Kind.HELLO),
        st.builds(Hello, nonce=texts, spec=tables, leaves=st.dictionaries(texts, texts)),
    ),
    st.tuples(
        st.just(Kind.FORWARD),
        st.builds(
            Forward,
            run_id=texts,
            step=small_ints,
            micro=small_ints,
            lengths=st.lists(small_ints, max_size=9),
            commit=st.none() | steps,
            is_evaluation=st.booleans(),
        ),
    ),
    st.just((Kind.DECODED, Decoded())),
)
packed_tensors = st.builds(
    Packed,
    codec=texts,
    dtype=texts,
    shape=st.lists(st.integers(0, 9), max_size=8).map(tuple),
    buffers=st.lists(st.binary(max_size=40), max_size=3).map(tuple),
)
frames = st.builds(
    lambda pair, tensors, call_id: Frame(*pair, tensors, call_id),
    headers,
    st.dictionaries(texts, packed_tensors, max_size=4),
    st.integers(0, 2**32 - 1),
)


@given(frames)
@settings(deadline=None)
def test_any_frame_comes_back_as_it_was(message: Frame) -> None:
    assert contents(frame.decode(joined(message))) == contents(message)


@pytest.mark.parametrize("message", sample_frames(), ids=lambda message: message.kind.name)
def test_every_kind_comes_back_as_it_was(message: Frame) -> None:
    assert contents(frame.decode(joined(message))) == contents(message)


@given(frames, st.data())
@settings(deadline=None)
def test_a_changed_byte_decodes_or_is_a_protocol_error(message: Frame, data: st.DataObject) -> None:
    encoded = joined(message)
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    with suppress(ProtocolError):
        frame.decode(encoded)


@given(frames, st.data())
@settings(deadline=None)
def test_every_prefix_and_every_tail_is_refused(message: Frame, data: st.DataObject) -> None:
    encoded = joined(message)
    end = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ProtocolError, match="truncated"):
        frame.decode(encoded[:end])
    with pytest.raises(ProtocolError, match="follow the frame's end"):
        frame.decode(encoded + b"\0" * data.draw(st.integers(1, 30)))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        frame.decode(data)


def test_golden_bytes_do_not_change() -> None:
    assert bytes(joined(golden_frame())) == GOLDEN.read_bytes()
    assert contents(frame.decode(GOLDEN.read_bytes())) == contents(golden_frame())


def test_the_worked_example_of_the_docs_is_the_golden_frame() -> None:
    text = DOCS.read_text(encoding="utf-8")
    (example,) = re.findall(r"```\n(434c 02.*?)```", text, flags=re.DOTALL)
    columns = [re.split(r"\s{2,}", line.strip())[0] for line in example.splitlines()]
    assert bytes.fromhex("".join(columns)) == GOLDEN.read_bytes()


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_the_docs_list_every_kind(kind: Kind) -> None:
    assert f"| {kind.value} | {kind.name} |" in DOCS.read_text(encoding="utf-8")


def test_every_kind_has_a_header_and_every_number_is_fixed() -> None:
    assert set(HEADERS) == set(Kind)
    assert {kind.name: kind.value for kind in Kind} == {
        **dict(HELLO=1, WELCOME=2, FAILED=3, OPEN_RUN=10, RUN_OPENED=11, FORWARD=12),
        **dict(FORWARD_DONE=13, BACKWARD=14, BACKWARD_DONE=15, COMMIT=16, COMMITTED=17),
        **dict(PULL_ADAPTER=18, TRUNK_ADAPTER=19, OPEN_SESSION=30, SESSION_OPENED=31),
        **dict(DECODE=32, DECODED=33, CLOSE_SESSION=34, CLOSED=35),
        **dict(JOIN=40, JOINED=41, ENTER_ROUND=42, ROUND=43, SHARE_KEYS=44, PEER_KEYS=45),
        **dict(SHARE_SECRETS=46, PEER_SECRETS=47, SEND_UPDATE=48, UPDATE_TAKEN=49, UNMASK=50),
        **dict(UNMASKED=51, LEAVE=52, LEFT=53, PUBLISH=54, PUBLISHED=55, WAIT=56),
        **dict(ADOPT=57, ADOPTED=58),
        **dict(DESCRIBE=60, TAKE_STATS=61, STATS=62, ADAPTER_LAYOUT=63, LAYOUT=64),
        **dict(BEGIN_ROUND=65, ROUND_BEGUN=66, COLLECT=67, COLLECTED=68, END_ROUND=69),
        **dict(ROUND_ENDED=70, CHALLENGE=72, EVIDENCE=73, KEY_REQUEST=74, KEY=75),
        **dict(ASK_ROWS=80, ROWS_MISSING=81, PUT_ROWS=82, ROWS_PUT=83, SCORE_ROWS=84),
        **dict(ROWS_SCORED=85, LEARN_LOGITS=86, LOGITS_LEARNT=87, DECODE_LOGITS=88, LOGITS=89),
        **dict(RECUT=90, RECUT_DONE=91),
    }


@pytest.mark.parametrize("name", list(codec.CODECS))
def test_a_decode_step_costs_less_than_112_bytes_of_overhead(name: str) -> None:
    header = Decode(session_id="f" * 32, rows=[3], lengths=[1], positions=[4000])
    h = codec.encode(torch.ones(1, 4096), name)
    assert frame.frame_bytes(Frame(Kind.DECODE, header, {"h": h}, 2**31)) - h.num_bytes < 112


def test_encoding_copies_no_tensor() -> None:
    x = torch.ones(4, 8)
    buffers = frame.encode(Frame(Kind.DECODED, Decoded(), {"y": codec.encode(x)}))
    x[0, 0] = 7.0
    assert torch.frombuffer(buffers[1], dtype=torch.float32)[0] == 7.0


def test_decoding_gives_views_of_the_received_bytes() -> None:
    data = joined(Frame(Kind.DECODED, Decoded(), {"y": codec.encode(torch.ones(4, 8))}))
    y = codec.decode(frame.decode(data).tensors["y"])
    data[-4:] = struct.pack("<f", 7.0)
    assert y[3, 7] == 7.0


def test_every_buffer_is_aligned_to_eight_bytes() -> None:
    tensors = {str(n): codec.encode(torch.ones(n, 3), "fp8") for n in range(1, 6)}
    data = joined(Frame(Kind.DECODED, Decoded(), tensors))
    base = memoryview(data)
    for name, packed in frame.decode(base).tensors.items():
        for buffer in packed.buffers:
            assert isinstance(buffer, memoryview)
            start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
            assert (start - torch.frombuffer(base, dtype=torch.uint8).data_ptr()) % 8 == 0, name


@pytest.mark.parametrize(
    ("index", "value", "text"),
    [
        (0, b"HT", "the peer is no cutlayer"),
        (1, 1, "protocol version 1; this side speaks 2 to 2"),
        (1, 3, "upgrade the older side"),
        (2, 99, "unknown kind 99"),
        (2, 0x80 | Kind.DECODE, "DECODE frame that claims to be like its call"),
        (2, 0x80 | Kind.DECODED, "like a call without a tensor"),
        (4, 2**32 - 1, "header of 4294967295 bytes; the limit is 1048576"),
        (5, 2**32 - 1, "the limit is 268435456"),
        (5, 16, "truncated: 64 of 72"),
        (5, 0, "8 bytes follow"),
        (4, 0, "40 bytes follow"),
    ],
)
def test_a_wrong_prelude_is_refused_with_what_is_wrong(
    index: int, value: object, text: str
) -> None:
    with pytest.raises(ProtocolError, match=text):
        frame.decode(with_prelude(joined(golden_frame()), index, value))


def test_oversized_frames_are_refused_from_the_prelude_alone() -> None:
    prelude = PRELUDE.pack(b"CL", 2, Kind.FORWARD, 1, 10, 5000)
    with pytest.raises(ProtocolError, match="FORWARD frame of 5032 bytes; the limit is 4096"):
        read_prelude(prelude, FrameLimits(max_frame_bytes=4096))


@pytest.mark.parametrize(
    ("entries", "body", "text"),
    [
        ([["y", "raw", "float32", [-1], [0]]], b"", "malformed: Expected `int` >= 0"),
        ([["y", "raw", "float32", [1], [-8]]], bytes(8), "malformed: Expected `int` >= 0"),
        ([["y", "raw", "float32", [1], [16]]], bytes(8), "describes 16 body bytes"),
        ([["y", "raw", "float32", [1], [4]], ["z", "raw", "float32", [1], [4]]], bytes(8), "16"),
        ([["y", "raw", "float32", [1], [4]]] * 2, bytes(16), "same name"),
        ([["y", "raw", "float32", [1], [4]]], bytes(7) + b"\1", "padding"),
        ([["y", "raw", "float32", [1] * 9, [4]]], bytes(8), "9 dimensions"),
        ([["y", "raw", "float32", [1 << 40], [4]]], bytes(8), "cannot fit"),
        ([["y", "raw", "float32", [0, 1 << 40], []]], b"", "cannot fit"),
        ([["n" * 300, "raw", "float32", [1], [4]]], bytes(8), "name"),
        ([["y", "raw", "float32", [1], [4], "more"]], bytes(8), "malformed"),
        ([["y", "raw", "float32", [1.5], [4]]], bytes(8), "malformed"),
        ([["y", "raw", "float32"]], b"", "malformed"),
        ([], bytes(8), "describes 0 body bytes"),
    ],
)
def test_a_wrong_tensor_table_is_refused(
    entries: list[list[object]], body: bytes, text: str
) -> None:
    with pytest.raises(ProtocolError, match=text):
        frame.decode(with_table(entries, body))


@pytest.mark.parametrize("position", [52, 55, 62])
def test_padding_that_is_not_zero_is_refused(position: int) -> None:
    data = joined(golden_frame())
    data[position] = 1
    with pytest.raises(ProtocolError, match="padding"):
        frame.decode(data)


def test_too_many_tensors_are_refused() -> None:
    table = with_table([[str(i), "raw", "float32", [0], []] for i in range(5)])
    assert len(frame.decode(table).tensors) == 5
    with pytest.raises(ProtocolError, match="5 tensors; the limit is 4"):
        frame.decode(table, FrameLimits(max_tensors=4))


def test_a_header_of_another_kind_is_refused() -> None:
    data = with_prelude(joined(golden_frame()), 2, int(Kind.WELCOME))
    with pytest.raises(ProtocolError, match="WELCOME header is malformed"):
        frame.decode(data)


def test_a_header_with_a_field_too_many_is_refused() -> None:
    header = msgspec.msgpack.encode([["s1", [0], [1], [2], "unknown"], []])
    prelude = PRELUDE.pack(b"CL", 2, Kind.DECODE, 1, len(header), 0)
    with pytest.raises(ProtocolError, match="DECODE header is malformed"):
        frame.decode(prelude + header + bytes(-(PRELUDE.size + len(header)) % 8))


def test_a_reply_keeps_the_version_of_its_call() -> None:
    assert frame.decode(joined(golden_frame())).version == 2


def like(value: float = 3.0, num_rows: int = 2) -> tuple[Frame, Frame]:
    """A call, and a reply that is laid out as it."""
    header = Decode(session_id="s", rows=[0], lengths=[num_rows], positions=[0])
    x = torch.full((num_rows, 5), value)
    call = Frame(Kind.DECODE, header, {"h": codec.encode(-x, "int8")}, call_id=9)
    return call, Frame(Kind.DECODED, Decoded(), {"y": codec.encode(x, "int8")}, call_id=9)


def test_a_reply_like_its_call_leaves_out_all_that_the_call_has_said() -> None:
    call, reply = like()
    assert frame.is_like_call(reply, call)
    short = joined(replace(reply, is_like_call=True))
    assert len(short) == frame.PRELUDE_BYTES + 16 + 8, "two buffers and nothing else"
    assert contents(frame.decode(short, call=call)) == contents(reply)


@pytest.mark.parametrize("kind", [Kind.FORWARD_DONE, Kind.BACKWARD_DONE])
def test_a_short_reply_keeps_its_message(kind: Kind) -> None:
    call, reply = like()
    header = HEADERS[kind](step=3, micro=1)  # type: ignore[call-arg]
    name = "grad" if kind is Kind.BACKWARD_DONE else "y"
    other = Frame(kind, header, {name: reply.tensors["y"]}, 9, is_like_call=True)
    assert frame.is_like_call(other, call)
    assert contents(frame.decode(joined(other), call=call)) == contents(other)


@pytest.mark.parametrize("change", ["name", "shape", "codec", "dtype", "lengths", "none", "two"])
def test_a_reply_that_differs_from_its_call_says_so(change: str) -> None:
    call, reply = like()
    y = reply.tensors["y"]
    tensors = {
        "name": {"z": y},
        "shape": {"y": replace(y, shape=(5, 2))},
        "codec": {"y": replace(y, codec="raw")},
        "dtype": {"y": replace(y, dtype="float16")},
        "lengths": {"y": replace(y, buffers=(*y.buffers, b""))},
        "none": {},
        "two": {"y": y, "z": y},
    }[change]
    assert not frame.is_like_call(replace(reply, tensors=tensors), call)


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_short_reply_to_a_call_of_another_size_is_refused(num_rows: int) -> None:
    call, _ = like(num_rows=num_rows)
    data = joined(replace(like()[1], is_like_call=True))
    with pytest.raises(ProtocolError, match=r"describes \d+ body bytes, the frame has 24"):
        frame.decode(data, call=call)


def test_a_short_reply_to_a_call_without_a_tensor_is_refused() -> None:
    call, reply = like()
    data = joined(replace(reply, is_like_call=True))
    (h,) = call.tensors.values()
    for other in (None, replace(call, tensors={}), replace(call, tensors={"h": h, "g": h})):
        with pytest.raises(ProtocolError, match="like a call without a tensor"):
            frame.decode(data, call=other)


def test_a_short_reply_may_not_bring_a_table_or_padding_that_is_not_zero() -> None:
    call, reply = like()
    data = joined(replace(reply, is_like_call=True))
    prelude = data[:8] + (2).to_bytes(4, "little") + data[12:16]
    with pytest.raises(ProtocolError, match="DECODED header is malformed"):
        frame.decode(prelude + b"\x90\x90" + bytes(6) + data[16:], call=call)
    data[-1] = 1
    with pytest.raises(ProtocolError, match="padding"):
        frame.decode(data, call=call)


def test_a_tensor_beyond_four_gigabytes_is_refused_by_its_sender() -> None:
    half = np.empty(1 << 31, np.uint8).data  # never touched, so it takes no memory
    packed = Packed(codec="raw", dtype="float32", shape=(1,), buffers=(half, half))
    with pytest.raises(ProtocolError, match="4294967296 bytes: send fewer rows"):
        frame.encode(Frame(Kind.DECODED, Decoded(), {"y": packed}))
