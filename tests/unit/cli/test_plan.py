"""`cutlayer plan`: a table, JSON and refusals from a model or a client's settings."""

from pathlib import Path

import pytest

from cutlayer.audit.results import Store
from cutlayer.planner.measurements import write_measurements
from tests.unit.audit.made_trials import trial_of
from tests.unit.cli.cli_world import CliWorld, run_command
from tests.unit.planner.plans import NUMBERS, count_once

_SMALL = ("--work", "mean_length=16", "--work", "rows_per_step=2", "--work", "prompt_tokens=8")


@pytest.fixture(autouse=True)
def _count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count_once(monkeypatch)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    write_measurements(tmp_path / "numbers.json", NUMBERS)
    return tmp_path / "numbers.json"


def test_a_plan_names_its_inputs_and_recommends_a_cut_per_goal(
    model: Path, numbers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "plan", str(model), "--measurements", str(numbers), *_SMALL, "--json")
    assert ran.code == 0, ran.err
    for said in ("fastest", "most private", "least memory", "balanced", "link", "no audit"):
        assert said in ran.err
    cuts = ran.result["cuts"]
    assert isinstance(cuts, list)
    assert len(cuts) == 10
    assert any(cut["pareto"] for cut in cuts)
    assert all(cut["leak"] is None for cut in cuts)
    chosen = ran.result["recommended"]
    assert isinstance(chosen, list)
    assert [one["goal"] for one in chosen] == [
        "fastest", "most private", "least memory", "balanced"
    ]  # fmt: skip


def test_a_machine_is_measured_and_its_numbers_are_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.json"
    words = ("--budget-s", "0", "--baseline-memory", "0.4", "--save-measurements", str(kept))
    ran = run_command(capsys, "plan", str(model), *words, *_SMALL, "--json")
    assert ran.code == 0, ran.err
    found = ran.result["measurements"]
    assert isinstance(found, dict)
    assert found["client"]["forward_s"] > 0
    assert found["client_source"].startswith("measured here")
    assert found["link_source"].startswith("default")
    words = ("--measurements", str(kept), "--baseline-memory", "0.4")
    again = run_command(capsys, "plan", str(model), *words, *_SMALL, "--json")
    assert again.result["cuts"] == ran.result["cuts"]
    other = run_command(capsys, "plan", str(model), *words, *_SMALL, "--work", "streams=3")
    assert "other work" in other.out
    half = run_command(capsys, "plan", str(model), *words, *_SMALL, "--work", "dtype=bfloat16")
    assert half.code == 2
    assert "another model" in half.err


def test_a_picture_and_all_cuts_are_drawn_and_shown(
    model: Path, numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--measurements", str(numbers), "--picture", str(tmp_path / "plan.png"), "--all")
    ran = run_command(capsys, "plan", str(model), *words, *_SMALL)
    assert ran.code == 0, ran.err
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert "3:4" in ran.out


def test_an_audit_fills_the_leak_and_decides_what_is_most_private(
    model: Path, numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "audit", "of tests")
    for cut, recovery in (((1, 3), 0.75), ((2, 3), 0.25)):
        store.save(trial_of(recovery, cut=cut))
    words = ("--measurements", str(numbers), "--audit", str(tmp_path / "audit"), *_SMALL)
    ran = run_command(capsys, "plan", str(model), *words, "--json")
    assert ran.code == 0, ran.err
    cuts, chosen = ran.result["cuts"], ran.result["recommended"]
    assert isinstance(cuts, list)
    assert isinstance(chosen, list)
    leaks = {(cut["lower"], cut["upper"]): cut["leak"] for cut in cuts}
    assert leaks[1, 3]["recovery"] == 0.75
    assert leaks[2, 3]["recovery"] == 0.25
    private = next(one for one in chosen if one["goal"] == "most private")
    assert (private["lower"], private["upper"]) == (2, 3)
    assert "25%" in private["reason"]


def test_a_probe_is_run_at_the_recommended_cuts(
    world: CliWorld, numbers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ("--probe", str(world.folder / "rows.jsonl"), "--probe-steps", "1")
    rows += ("--probe-seeds", "2")
    steps = ("--set", "train.rows_per_step=2")
    words = ("--measurements", str(numbers), *rows, *steps, "--json")
    ran = run_command(capsys, "plan", str(world.client), *words)
    assert ran.code == 0, ran.err
    probed, chosen = ran.result["probe"], ran.result["recommended"]
    assert isinstance(probed, dict)
    assert isinstance(chosen, list)
    cuts = {(one["lower"], one["upper"]) for one in probed["cuts"]}
    assert cuts == {(one["lower"], one["upper"]) for one in chosen}
    assert probed["sentence"] in ran.err
    assert all(len(one["losses"]) == 2 for one in probed["cuts"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--client-memory", "0.001"), "the least that would do"),
        (("--client-memory", "-1"), "--client-memory"),
        (("--server-blocks", "7"), "LOWER:UPPER"),
        (("--server-blocks", "2:9"), "--server-blocks"),
        (("--work", "mean_lenght=3"), "did you mean mean_length"),
        (("--work", "codec=zip"), "codec"),
        (("--work", "dtype=int3"), "dtype"),
        (("--work", "mean_length"), "name=value"),
        (("--set", "train.lr=1"), "--work"),
        (("--picture", "/nowhere/at/all.png"), "folder that exists"),
        (("--audit", "nowhere.json"), "nowhere.json"),
        (("--probe", "rows.jsonl"), "client's settings"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_reason(
    words: tuple[str, ...],
    said: str,
    model: Path,
    numbers: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = ("--measurements", str(numbers))
    ran = run_command(capsys, "plan", str(model), *measured, *_SMALL, *words)
    assert ran.code not in (0, 1)
    assert said in ran.err


def test_a_server_that_does_not_answer_is_named_with_what_to_give_instead(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--budget-s", "0", "--baseline-memory", "0.4")
    ran = run_command(capsys, "plan", str(world.client), *words)
    assert ran.code == 7
    assert "--rtt-ms" in ran.err


def test_a_clients_settings_are_planned_without_its_server_where_the_link_is_given(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--no-measure", "--baseline-memory", "0.4", "--rtt-ms", "5", "--mbit-per-s", "50")
    ran = run_command(capsys, "plan", str(world.client), *words, "--json")
    assert ran.code == 0, ran.err
    cuts, workload = ran.result["cuts"], ran.result["workload"]
    assert isinstance(cuts, list)
    assert isinstance(workload, dict)
    assert workload["rows"] == 24
    # Without a measured end of the model no time is guessed.
    assert all(cut["training_s_per_1000"] is None for cut in cuts)
    assert "seconds are unknown" in ran.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("checks.spot_check_every=4", "weights of the server"),
        ("privacy.withhold=private", "does not generate"),
        ("hops", "planned as one trunk"),
    ],
)
def test_what_settings_ask_for_and_a_plan_does_not_count_is_told(
    change: str, said: str, world: CliWorld, numbers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--measurements", str(numbers)]
    if change == "hops":
        hops = "[[hops]]\nlower = 1\nupper = 2\n\n[[hops]]\nlower = 2\nupper = 3\n"
        hops += 'connection = {address = "127.0.0.1:2"}\nprivacy = {mechanism = "none"}\n'
        text = world.client.read_text().replace("hops = []\n", "")
        world.client.write_text(text + "\n" + hops)
    else:
        words += ["--set", change]
    ran = run_command(capsys, "plan", str(world.client), *words, "--json")
    assert ran.code == 0, ran.err
    notes = ran.result["notes"]
    assert isinstance(notes, list)
    assert any(said in note for note in notes), notes


def test_another_kind_of_adapter_is_planned_or_refused_by_name(
    model: Path, numbers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("plan", str(model), "--measurements", str(numbers), *_SMALL, "--json")
    assert run_command(capsys, *words, "--work", "adapter.kinds=[prefix]").code == 0
    ran = run_command(capsys, *words, "--work", "adapter.kinds=[sparse]")
    assert ran.code == 4
    assert "chosen by the weights" in ran.err


def test_a_plan_names_only_commands_that_there_are(
    model: Path, numbers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "plan", str(model), "--measurements", str(numbers), *_SMALL)
    assert "cutlayer audit run" not in ran.out + ran.err
