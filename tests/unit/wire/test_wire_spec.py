"""The spec: what differs is named, all of it at once."""

from dataclasses import replace

import pytest

from cutlayer.errors import ProtocolError, SpecMismatch
from cutlayer.wire.spec import Spec, compare

MINE = Spec(
    model_type="llama",
    n_block=30,
    lower=2,
    upper=28,
    hidden_size=576,
    dtype="float32",
    codec_up="bf16",
    codec_down="bf16",
)


def test_equal_specs_agree_and_survive_the_wire() -> None:
    compare(MINE, Spec.from_table(MINE.to_table()))


def test_every_differing_field_is_named_with_both_values_and_a_hint() -> None:
    theirs = replace(MINE, lower=1, upper=20, codec_up="fp8")
    with pytest.raises(SpecMismatch) as caught:
        compare(MINE, theirs)
    text = str(caught.value)
    assert (
        "lower: ours 2, the peer's 1 (choose a cut within the blocks that the server holds)" in text
    )
    assert "upper: ours 28, the peer's 20" in text
    assert "codec_up: ours 'bf16', the peer's 'fp8'" in text
    assert "codec_down" not in text


@pytest.mark.parametrize("field", sorted(MINE.to_table()))
def test_no_field_is_forgotten_by_the_comparison(field: str) -> None:
    value = MINE.to_table()[field]
    other = value + 1 if isinstance(value, int) else "other"
    with pytest.raises(SpecMismatch, match=field):
        compare(MINE, Spec.from_table({**MINE.to_table(), field: other}))


def test_a_protocol_version_outside_the_supported_range_says_who_upgrades() -> None:
    with pytest.raises(SpecMismatch, match="speaks 2 to 2; upgrade the older side"):
        compare(MINE, replace(MINE, protocol=3))


def test_fields_of_another_version_are_named() -> None:
    table = MINE.to_table()
    del table["dtype"]
    table["compression"] = "zstd"
    with pytest.raises(SpecMismatch, match=r"missing: dtype; unknown: compression.*upgrade"):
        Spec.from_table(table)


@pytest.mark.parametrize(("field", "value"), [("lower", "2"), ("dtype", 32), ("n_block", True)])
def test_values_of_the_wrong_type_are_refused(field: str, value: str | int) -> None:
    with pytest.raises(ProtocolError, match=f"spec field {field}"):
        Spec.from_table({**MINE.to_table(), field: value})
