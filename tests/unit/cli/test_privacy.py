"""`cutlayer privacy`: the noise of an epsilon, and what a run has told."""

import json
from pathlib import Path

import pytest

from cutlayer.privacy.run_privacy import open_run_privacy
from tests.unit.cli.cli_world import CliWorld, run_command


def test_plan_prints_the_noise_with_all_that_belongs_to_an_epsilon(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--epsilon", "8", "--rows", "10000", "--epochs", "1", "--frozen-head")
    ran = run_command(capsys, "privacy", "plan", *words)
    for word in ("14.42", "per row", "1e-05", "replace one", "RDP", "PLD", "no recorded run"):
        assert word in ran.out
    assert "utility to expect from recorded runs without noise" in " ".join(ran.out.split())
    assert "0.963 (unprotected 0.963): topic of a news article" in ran.out


def test_plan_shows_what_recorded_runs_cost(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = {"mechanism": "clipped_gaussian", "scale": 15.0, "clip": 9.0, "withhold": "none"}
    run |= {"cut": [2, 28], "task": "reviews", "score": 0.41, "score_without_noise": 0.9}
    (tmp_path / "runs.json").write_text(json.dumps([run]))
    words = ("--epsilon", "8", "--rows", "9", "--frozen-head", "--runs", tmp_path / "runs.json")
    assert "scale=15, clip=9" in run_command(capsys, "privacy", "plan", *words).out
    ran = run_command(capsys, "privacy", "plan", *words, "--json")
    found = json.loads(ran.out.splitlines()[-1])
    assert found["recorded"][0]["score"] == 0.41
    assert found["recorded_without_noise"] == []
    assert found["epsilon_pld"] < found["epsilon_rdp"] < 8.0
    assert found["steps"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--epsilon", "8", "--rows", "0"), "rows must be 1"),
        (("--epsilon", "0", "--rows", "9"), "epsilon must be above 0"),
        (("--epsilon", "8", "--rows", "9", "--unit", "word"), "known: token vector, row, client"),
        (("--epsilon", "8", "--rows", "9", "--mechanism", "gaussian"), "has no epsilon"),
        (("--epsilon", "8", "--rows", "9", "--delta", "2"), "delta must lie"),
    ],
)
def test_plan_refuses_what_it_cannot_plan(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    ran = run_command(capsys, "privacy", "plan", *words)
    assert ran.code != 0
    assert said in ran.err


def test_show_reads_a_run_and_says_what_it_promises(
    world: CliWorld, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "shown"
    setting = f'run.folder="{folder}"'
    ran = run_command(capsys, "privacy", "show", "--config", world.client, "--set", setting)
    assert "holds no run" in ran.err
    open_run_privacy(folder, "run-1").__exit__(None, None, None)
    words = ("--config", world.client, "--set", setting, "--json")
    ran = run_command(capsys, "privacy", "show", *words)
    found = json.loads(ran.out.splitlines()[-1])
    assert found["promises"] == []
    assert set(found["rules"]) == {"lower cut", "gradients"}
