"""A hundred ways for evidence to be wrong, on every platform, each refused by its right name."""

import pytest

from cutlayer.errors import AttestationError
from tests.unit.tee.judged_cases import Row, judge
from tests.unit.tee.refusal_bases import BASES, base
from tests.unit.tee.refusal_table import ROWS

REFUSED_AS_IT_IS = {"published sev-snp"}
"""Its debug bit is set."""


def _case(value: object, needs_published: bool) -> object:
    """A parameter; what needs the published samples fails where they must be there."""
    return pytest.param(value, marks=pytest.mark.system if needs_published else ())


@pytest.mark.parametrize(
    "name",
    [_case(name, name.startswith("published")) for name in BASES if name not in REFUSED_AS_IT_IS],
)
def test_what_every_row_changes_is_accepted_before(name: str) -> None:
    judge(base(name))


@pytest.mark.parametrize(
    "row",
    [_case(row, row.needs_published) for row in ROWS],
    ids=lambda row: f"{row.base}: {row.what}",
)
def test_what_is_wrong_is_refused_by_its_name(row: Row) -> None:
    with pytest.raises(AttestationError) as caught:
        judge(row.change(base(row.base)))
    assert caught.value.refusal == row.refusal
    assert str(caught.value).startswith(f"{row.refusal}: ")


def test_the_table_is_long_and_wide() -> None:
    assert len(ROWS) >= 100
    assert len({(row.base, row.what) for row in ROWS}) == len(ROWS)
    assert len({row.refusal for row in ROWS}) >= 16
