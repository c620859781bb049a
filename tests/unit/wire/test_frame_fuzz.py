"""Seeded mutation fuzzing of `frame.decode` and the codecs behind it.

Every mutant decodes or raises ProtocolError; anything else is a bug that a peer can trigger.
"""

import random
from dataclasses import replace

from wire_samples import joined, sample_frames

from cutlayer.errors import ProtocolError
from cutlayer.wire import codec, frame
from cutlayer.wire.frame import PRELUDE_BYTES, Frame, FrameLimits
from cutlayer.wire.messages import Kind

NUM_CASES = 20_000
CASES = range(NUM_CASES)
INTERESTING = [0, 1, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xCF, 0xD9, 0xDB, 0xDC, 0xDD, 0xDF, 0xFF]


def corpus() -> list[bytes]:
    return [bytes(joined(message)) for message in sample_frames()]


def mutate(data: bytearray, rng: random.Random) -> bytearray:
    """Some of: bits flipped, bytes set, pieces removed, doubled or made up."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if data else 0
        size = rng.choice([1, 1, 2, 4, 8, 30])
        match rng.randrange(6):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at] = rng.choice(INTERESTING)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at:at] = rng.randbytes(size)
            case _:
                data[at : at + size] = rng.randbytes(size)
    return data


def is_accepted(data: bytearray, limits: FrameLimits, call: Frame | None = None) -> bool:
    try:
        for packed in frame.decode(data, limits, call).tensors.values():
            codec.decode(packed)
    except ProtocolError:
        return False
    return True


def test_no_mutant_gets_anything_but_a_protocol_error() -> None:
    rng = random.Random(20261121)
    seeds = corpus()
    limits = FrameLimits(max_frame_bytes=1 << 16)
    num_whole = sum(is_accepted(mutate(bytearray(rng.choice(seeds)), rng), limits) for _ in CASES)
    assert NUM_CASES // 100 < num_whole < NUM_CASES // 2, num_whole


def test_no_mutated_header_gets_anything_but_a_protocol_error() -> None:
    """The prelude stays right, so that every case reaches the header's decoder."""
    rng = random.Random(7)
    seeds = corpus()
    for _ in range(NUM_CASES // 4):
        seed = rng.choice(seeds)
        size = int.from_bytes(seed[8:12], "little")
        header = mutate(bytearray(seed[PRELUDE_BYTES : PRELUDE_BYTES + size]), rng)
        body = seed[-(-(PRELUDE_BYTES + size) // 8) * 8 :]
        prelude = seed[:8] + len(header).to_bytes(4, "little") + seed[12:PRELUDE_BYTES]
        padding = bytes(-(PRELUDE_BYTES + len(header)) % 8)
        is_accepted(bytearray(prelude + header + padding + body), FrameLimits())


def test_no_mutant_of_a_short_reply_gets_anything_but_a_protocol_error() -> None:
    rng = random.Random(11)
    (call,) = [one for one in sample_frames() if one.kind is Kind.DECODE]
    h = next(iter(call.tensors.values()))
    call = replace(call, tensors={"h": h})
    replies = [one for one in sample_frames() if one.kind in (Kind.DECODED, Kind.FORWARD_DONE)]
    seeds = [joined(replace(one, tensors={"y": h}, is_like_call=True)) for one in replies]
    assert all(is_accepted(seed, FrameLimits(), call) for seed in seeds)
    for _ in range(NUM_CASES // 8):
        is_accepted(mutate(bytearray(rng.choice(seeds)), rng), FrameLimits(), call)
