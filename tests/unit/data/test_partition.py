"""Rows of a simulated federation: every row to exactly one owner, the same owners for one seed."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.data.partition import PARTITIONS, PartitionSettings, partition
from cutlayer.errors import ConfigError, DataError

KEYS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=8, max_size=200)


def _skew(alpha: float, num_owners: int = 5) -> float:
    """Largest share of one label, mean over owners."""
    keys = [f"label{row % 4}" for row in range(1000)]
    rule = PartitionSettings(kind="dirichlet", alpha=alpha)
    parts = partition(keys, num_owners, rule, seed=3)
    tops = [Counter(keys[row] for row in rows).most_common(1)[0][1] / len(rows) for rows in parts]
    return sum(tops) / len(tops)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
@given(
    keys=KEYS, num_owners=st.integers(1, 4), seed=st.integers(0, 2**32), alpha=st.floats(1e-6, 1e6)
)
@settings(max_examples=40, deadline=None)
def test_every_row_goes_to_exactly_one_owner_and_sizes_are_even(
    kind: str, keys: list[str], num_owners: int, seed: int, alpha: float
) -> None:
    rule = PartitionSettings(kind=kind, alpha=alpha)
    parts = partition(keys, num_owners, rule, seed)
    assert sorted(row for rows in parts for row in rows) == list(range(len(keys)))
    sizes = [len(rows) for rows in parts]
    assert max(sizes) - min(sizes) <= 1
    assert partition(keys, num_owners, rule, seed) == parts


@given(keys=KEYS, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_natural_owners_are_the_values_of_the_column(keys: list[str], seed: int) -> None:
    names = sorted(set(keys))
    rule = PartitionSettings(kind="natural", column="owner", min_rows=1)
    parts = partition(keys, len(names), rule, seed)
    assert [{keys[row] for row in rows} for rows in parts] == [{name} for name in names]
    assert sorted(row for rows in parts for row in rows) == list(range(len(keys)))


def test_seeds_give_other_owners() -> None:
    keys = ["a", "b"] * 50
    for kind in ("iid", "dirichlet"):
        rule = PartitionSettings(kind=kind)
        assert partition(keys, 4, rule, seed=0) != partition(keys, 4, rule, seed=1)


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    assert _skew(0.05) > 0.45
    assert _skew(1000.0) < 0.3


def test_too_few_rows_for_an_owner_are_named() -> None:
    with pytest.raises(DataError, match=r"owner 2 of 3 gets 1 of 4 rows, 2 are wanted"):
        partition(["a"] * 4, 3, PartitionSettings(), seed=0)


def test_natural_owners_must_match_the_column() -> None:
    rule = PartitionSettings(kind="natural", column="site")
    with pytest.raises(ConfigError, match="3 owners, but column site has 2 different values"):
        partition(["a", "b"] * 5, 3, rule, seed=0)


def test_unknown_rules_and_no_owner_are_refused() -> None:
    with pytest.raises(ConfigError, match="known: dirichlet, iid, natural"):
        partition(["a"], 1, PartitionSettings(kind="iidd"), seed=0)
    with pytest.raises(ConfigError, match="at least one"):
        partition(["a"], 0, PartitionSettings(), seed=0)
    assert PARTITIONS.names == ("dirichlet", "iid", "natural")
