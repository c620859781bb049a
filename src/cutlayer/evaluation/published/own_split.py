"""Training and test rows of data that come without a split: ours, fixed, the same for everyone.

It reads no file and orders nothing: rows come in an order of their own, such as that of a hash.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from cutlayer.data.resemblance import Resembling
from cutlayer.errors import DataError
from cutlayer.evaluation.published.question import Split

__all__ = ["TEST_SHARE", "own_split", "text_key"]

T = TypeVar("T")

TEST_SHARE = 4
"""One row of so many is a test row."""


def own_split(rows: Sequence[T], text_of: Callable[[T], str], split: Split, what: str) -> list[T]:
    """Rows of one split: the first quarter to test, of the others all that resemble no test row.

    Args:
        rows: distinct, in an order that nobody chooses.
        text_of: the text of a row, by which rows resemble each other.
        split: training or test.
        what: the data, for the error.

    Raises:
        DataError: there is no such split, or too few rows to have one.
    """
    num_test = len(rows) // TEST_SHARE
    if split is Split.VALIDATION:
        raise DataError(f"{what} has no validation split; use its train or test split")
    if not num_test:
        raise DataError(f"{what} has {len(rows)} usable rows, too few to split; fetch it again")
    if split is Split.TEST:
        return list(rows[:num_test])
    tested = Resembling(map(text_of, rows[:num_test]))
    return [row for row in rows[num_test:] if text_of(row) not in tested]


def text_key(split: Split, text: str) -> str:
    """A key that stays with a text whatever else its file holds."""
    return f"{split.value}/{hashlib.sha256(text.casefold().encode()).hexdigest()[:16]}"
