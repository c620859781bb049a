"""Names of forked runs, and the one list of tensors in which weights and moments travel."""

import pytest

from cutlayer.wire.recut_messages import fork_id, named_tensors, parent_id, split_tensors


@pytest.mark.parametrize(
    ("name", "next_name"),
    [("ab12", "ab12.c1"), ("ab12.c1", "ab12.c2"), ("x.c9", "x.c10"), ("x.c0", "x.c0.c1")],
)
def test_every_recut_has_the_next_name(name: str, next_name: str) -> None:
    assert fork_id(name) == next_name
    assert parent_id(next_name) == name


def test_a_run_that_was_never_recut_has_no_parent() -> None:
    assert parent_id("ab12") is None


def test_weights_and_moments_travel_in_one_list() -> None:
    weights, moments = {"a.weight": 1}, {"a.weight.exp_avg": 2}
    assert split_tensors(named_tensors(weights, moments)) == (weights, moments)


def test_a_tensor_of_another_name_is_found() -> None:
    assert split_tensors({"adapter/a": 1, "labels": 2}) is None
