from dataclasses import replace

import pytest
import torch

from benchmarks.attacks import SMOKE, measure, result_of
from benchmarks.attacks_subject import tiny_subject
from cutlayer.audit.attack import Aim
from cutlayer.audit.results import AttackResult
from cutlayer.audit.shares import share

KEYS = {"recovery_clean", "recovery_published_scales", "recovery_pure_noise", "chance"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    torch.manual_seed(0)
    subject = tiny_subject(tmp_path_factory.mktemp("attacks"), None)
    # Both end long before: what they find must not depend on who else computes.
    plan = replace(SMOKE, seconds=60.0)
    return measure(subject, plan, ["vocabulary_matching", "language_prior"])


def test_every_attack_has_an_object_under_its_name(
    measured: dict[str, dict[str, object]],
) -> None:
    assert measured.keys() == {"vocabulary_matching", "language_prior"}
    assert all(one.keys() >= KEYS for one in measured.values())


def test_matching_finds_all_without_noise_at_every_depth_and_nothing_in_noise(
    measured: dict[str, dict[str, object]],
) -> None:
    one = measured["vocabulary_matching"]
    recovery = one["recovery_clean"]
    assert isinstance(recovery, float)
    assert recovery > 0.95
    depths = one["recovery_clean_by_depth"]
    assert isinstance(depths, dict)
    assert depths.keys() == {"p=1", "p=2"}
    assert one["is_at_chance_on_pure_noise"] is True


def test_the_prior_says_the_same_whatever_left(measured: dict[str, dict[str, object]]) -> None:
    one = measured["language_prior"]
    assert one["recovery_clean"] == one["recovery_pure_noise"]


def test_an_attack_that_cannot_run_is_named_with_its_reason() -> None:
    skipped = AttackResult(attack="a", aim=Aim.BAG, about="b", skipped="no update left")
    one = result_of("a", {"none": skipped, "noise": skipped, "gaussian scale=0.05": skipped})
    assert one["skipped"] == "no update left"
    assert one["recovery_clean"] is None
    assert one["recovery_published_scales"] == {"0.05": None}


def test_the_depth_with_the_least_recovery_counts() -> None:
    def result(num: int) -> AttackResult:
        return AttackResult(attack="a", aim=Aim.TOKENS, about="b", recovery=share(num, 10))

    results = {"none": result(10), "noise": result(0), "p=1": result(10), "p=4": result(9)}
    assert result_of("a", results)["recovery_clean"] == 0.9


def test_a_depth_at_which_an_attack_could_not_run_is_no_success() -> None:
    good = AttackResult(attack="a", aim=Aim.TOKENS, about="b", recovery=share(10, 10))
    skipped = AttackResult(attack="a", aim=Aim.TOKENS, about="b", skipped="nothing to match")
    results = {"none": good, "noise": good, "p=1": good, "p=4": skipped}
    assert result_of("a", results)["recovery_clean"] is None
