"""The few tokens that may leave: those that tell the answer, never rare ones, never the answer."""

import math

import pytest

from cutlayer.data.batches import batch
from cutlayer.data.telling import mark_withheld, tell
from cutlayer.data.template import Example
from cutlayer.errors import ConfigError

GOOD, BAD, THE, COLON = 1, 2, 3, 4


def _row(number: int, *text: int, answer: int) -> Example:
    tokens = [*text, COLON, answer]
    labels = [-100] * (len(text) + 1) + [answer]
    return Example(tokens, labels, number, [True] * len(text) + [False, True])


def _rows() -> list[Example]:
    """Word 1 goes with answer 8, word 2 with 9, word 3 with both, and each row has its own word."""
    rows = [_row(n, THE, GOOD, 100 + n, THE, answer=8) for n in range(6)]
    return rows + [_row(n, THE, BAD, 100 + n, THE, answer=9) for n in range(6, 12)]


def test_bits_are_those_of_the_definition() -> None:
    bits = tell(_rows())
    # Six of six rows, and five more of which half say each: (6 + 2.5) / 11 and 2.5 / 11.
    likely, unlikely = 8.5 / 11, 2.5 / 11
    surprise = likely * math.log2(2 * likely) + unlikely * math.log2(2 * unlikely)
    assert bits[GOOD] == pytest.approx(surprise)
    assert bits[BAD] == pytest.approx(surprise)
    assert bits[THE] == pytest.approx(0.0)


def test_a_sure_sign_of_few_rows_goes_before_a_vague_one_of_many() -> None:
    """In the row that has it, it tells more, though over all rows it tells less."""
    sure, vague = 50, 51
    rows = [_row(n, sure, vague, answer=8) for n in range(6)]
    rows += [_row(n, vague, answer=8) for n in range(6, 40)]
    rows += [_row(n, THE, answer=9) for n in range(40, 70)]
    rows += [_row(n, vague, answer=9) for n in range(70, 80)]
    (first, *_), _ = mark_withheld(rows, [], 0.5)
    assert first.is_withheld[:2] == [False, True]


def test_what_few_rows_have_is_never_chosen() -> None:
    assert not any(token >= 100 for token in tell(_rows()))
    (row, *_), _ = mark_withheld(_rows(), [], 1.0)
    assert row.is_withheld == [False, False, True, True, False, True]


def test_a_share_of_the_private_tokens_leaves_and_tells_the_most() -> None:
    train, validation = mark_withheld(_rows(), _rows()[:2], 0.25)
    for row in (*train, *validation):
        leaving = [t for t, stays in zip(row.tokens, row.is_withheld, strict=True) if not stays]
        assert leaving in ([GOOD, COLON], [BAD, COLON])


def test_without_a_share_all_that_is_private_stays() -> None:
    train, _ = mark_withheld(_rows(), [], 0.0)
    assert all(row.is_withheld == row.is_private for row in train)


def test_a_batch_says_what_stays() -> None:
    rows, _ = mark_withheld(_rows(), [], 0.25)
    assert batch(rows, [0]).withheld_N.tolist() == rows[0].is_withheld
    plain = batch(_rows(), [0])
    assert plain.withheld_N.equal(plain.private_N)


def test_completions_that_never_repeat_are_refused() -> None:
    rows = [_row(n, THE, answer=1000 + n) for n in range(65)]
    with pytest.raises(ConfigError, match="keep_share"):
        mark_withheld(rows, [], 0.1)
