"""Fields that a later release added: absent where they say nothing, so older receivers read on."""

import msgspec

from cutlayer.wire import frame
from cutlayer.wire.federation_messages import Round
from cutlayer.wire.frame import PRELUDE_BYTES, Frame
from cutlayer.wire.messages import HEADERS, Kind

PLAIN = Round(
    round=3,
    attempt=1,
    is_finished=False,
    cohort=["a", "b"],
    digest="00",
    payload_digest="11",
    survivors=[],
    total_weight=7,
    sum_attempt=2,
)


def _written(header: Round) -> list[object]:
    data = frame.encode(Frame(Kind.ROUND, header))[0]
    length = frame.read_prelude(data, frame.FrameLimits()).header_bytes
    message, table = msgspec.msgpack.decode(data[PRELUDE_BYTES : PRELUDE_BYTES + length])
    assert table == []
    return message


def test_a_round_of_one_cut_travels_as_it_ever_did() -> None:
    assert _written(PLAIN) == [3, 1, False, ["a", "b"], "00", "11", [], 7, 2]


def test_a_round_of_different_cuts_says_them() -> None:
    mixed = msgspec.structs.replace(PLAIN, cuts={"a": [1, 7], "b": [2, 6]})
    assert _written(mixed)[-1] == {"a": [1, 7], "b": [2, 6]}
    for header in (PLAIN, mixed):
        data = b"".join(map(bytes, frame.encode(Frame(Kind.ROUND, header))))
        assert frame.decode(data).header == header


def test_late_fields_are_the_last_and_empty_by_default() -> None:
    for header in HEADERS.values():
        fields = msgspec.structs.fields(header)
        for field in fields[len(fields) - header.num_late :]:
            assert field.default_factory is not msgspec.NODEFAULT
            assert not field.default_factory()
