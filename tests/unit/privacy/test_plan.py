"""Plans: the noise they name keeps the epsilon, to the last release."""

import json
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError
from cutlayer.privacy.accountant import RdpAccountant
from cutlayer.privacy.guarantee import PrivacyUnit
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.plan import Workload, plan_noise
from cutlayer.privacy.recorded_runs import comparable_runs, load_recorded, runs_without_noise

RUN = {
    "mechanism": "clipped_gaussian",
    "scale": 20.0,
    "clip": 1.0,
    "withhold": "none",
    "cut": [2, 28],
    "task": "reviews",
    "score": 0.5,
    "score_without_noise": 0.9,
    "recovery": 0.1,
}


@pytest.mark.parametrize("mechanism", ["clipped_gaussian", "matrix_gaussian", "metric_dp"])
def test_the_planned_noise_lasts_for_the_whole_run_and_no_noise_is_wasted(mechanism: str):
    work = Workload(rows=20, epochs=2, tokens_per_row=5)
    plan = plan_noise(mechanism, 8.0, 1e-5, PrivacyUnit.ROW, work, clip=3.0)
    accountant = RdpAccountant()
    for _ in range(40):
        accountant.compose(MECHANISMS.make(mechanism, plan.scale, 3.0).event(5))
    assert 7.99 < accountant.epsilon(1e-5) <= 8.0
    assert plan.exact.epsilon is not None
    assert plan.exact.epsilon < 8.0


@pytest.mark.parametrize(
    ("unit", "head_trains", "gradients", "applications"),
    [
        ("token vector", True, False, 3),
        ("token vector", False, False, 1),
        ("row", False, False, 7),
        ("row", True, False, 7 * 3 * 10),
        ("client", False, False, 7 * 10),
        ("row", False, True, 7 + 7 * 3 * 10),
    ],
)
def test_what_counts_for_one_unit(unit: str, head_trains: bool, gradients: bool, applications: int):
    work = Workload(
        rows=10, epochs=3, tokens_per_row=7, head_trains=head_trains, has_gradients=gradients
    )
    plan = plan_noise("clipped_gaussian", 8.0, 1e-5, PrivacyUnit(unit), work)
    assert plan.applications == applications


@pytest.mark.parametrize("mechanism", ["none", "gaussian", "laplace"])
def test_a_mechanism_without_an_epsilon_is_refused(mechanism: str):
    with pytest.raises(ConfigError, match=f"mechanism '?{mechanism}'? "):
        plan_noise(mechanism, 8.0, 1e-5, PrivacyUnit.ROW, Workload(rows=1))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="rows must be 1 or more"):
        Workload(rows=0)
    for epsilon in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="epsilon must be above 0"):
            plan_noise("clipped_gaussian", epsilon, 1e-5, PrivacyUnit.ROW, Workload(rows=1))


def test_recorded_runs_are_compared_by_mechanism_and_scale(tmp_path: Path):
    near, far = {**RUN, "scale": 15.0}, {**RUN, "scale": 50.0}
    other = {**RUN, "mechanism": "matrix_gaussian"}
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([far, near, other, RUN]))
    found = comparable_runs(load_recorded(path), "clipped_gaussian", 20.0)
    assert [run.scale for run in found] == [20.0, 15.0]


def test_the_runs_of_the_package_are_those_that_the_benchmark_measured():
    path = Path(__file__).parents[3] / "benchmarks" / "results" / "pareto-two-cores.json"
    measured = json.loads(path.read_text())
    settings = {(one["label"], one["steps"]): one for one in measured["settings"]}
    recorded = load_recorded()
    assert len(recorded) == len(settings)
    for run in recorded:
        withheld = "" if run.withhold == "none" else f", withhold={run.withhold}"
        label = f"cut {run.cut[0]}:{run.cut[1]}, {run.mechanism}{withheld}, trained"
        one = settings[label, run.steps]
        assert run.score == pytest.approx(one["accuracy"], abs=1e-4)
        assert run.recovery == pytest.approx(one["recovery"], abs=1e-4)
        assert run.score_without_noise == pytest.approx(measured["reference_accuracy"], abs=1e-4)
        assert run.model
        assert run.epsilon is None, "nothing was promised, so no epsilon is shown"


def test_runs_without_noise_come_best_first():
    scores = [run.score for run in runs_without_noise(load_recorded())]
    assert scores == sorted(scores, reverse=True)
    assert scores


@pytest.mark.parametrize("text", ["", "{}", '[{"mechanism": "x"}]'])
def test_a_file_that_is_no_list_of_runs_is_refused(tmp_path: Path, text: str):
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(ConfigError, match="is no list of runs"):
        load_recorded(tmp_path / "runs.json")
    with pytest.raises(ConfigError, match="cannot read recorded runs"):
        load_recorded(tmp_path / "none.json")
