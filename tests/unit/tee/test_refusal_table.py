"""Ninety ways for evidence to be wrong, over all platforms, each refused by its right name."""

import pytest

from cutlayer.errors import AttestationError
from tests.unit.tee.judged_cases import judge
from tests.unit.tee.refusal_table import BASES, ROWS, Row, base

REFUSED_AS_IT_IS = {"published sev-snp"}
"""Its debug bit is set."""


def _cases(values: list[tuple[str, object]]) -> list[object]:
    """Parameters; what needs the published samples is a failure where they must be there."""
    return [
        pytest.param(value, marks=pytest.mark.system if name.startswith("published") else ())
        for name, value in values
    ]


@pytest.mark.parametrize("name", _cases([(n, n) for n in BASES if n not in REFUSED_AS_IT_IS]))
def test_what_every_row_changes_is_accepted_before(name: str) -> None:
    judge(base(name))


@pytest.mark.parametrize(
    "row", _cases([(row.base, row) for row in ROWS]), ids=lambda row: f"{row.base}: {row.what}"
)
def test_what_is_wrong_is_refused_by_its_name(row: Row) -> None:
    with pytest.raises(AttestationError) as caught:
        judge(row.change(base(row.base)))
    assert caught.value.refusal == row.refusal
    assert str(caught.value).startswith(f"{row.refusal}: ")


def test_the_table_is_long_and_wide() -> None:
    assert len(ROWS) >= 90
    assert len({(row.base, row.what) for row in ROWS}) == len(ROWS)
    assert len({row.refusal for row in ROWS}) >= 16
