"""A federation in one command: threads and processes, the table, errors, nothing left behind."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cutlayer.demo.federation import federation_settings
from cutlayer.errors import ConfigError
from cutlayer.settings import load_settings
from cutlayer.simulation.results import SimulationResult
from cutlayer.simulation.run import run_simulation
from cutlayer.simulation.settings import SimulationSettings
from cutlayer.storage.files import private_folder
from tests.leftovers import child_processes
from tests.tiny_models import tiny_llama_folder
from tests.unit.simulation.simulated import simulated, table

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


def _run(
    model: Path, folder: Path, name: str = "work", trace: Path | None = None, **changes: object
) -> SimulationResult:
    settings = simulated(model, folder, **changes)
    return run_simulation(settings, private_folder(folder / name), lambda text: None, trace)


def _lanes(path: Path) -> set[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return {event["args"]["name"] for event in events if event["name"] == "thread_name"}


def _owner_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("owner", "scores"))]


def test_owners_as_threads_learn_together_and_alone(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = _run(model, tmp_path, trace=trace)
    assert [owner.name for owner in result.owners] == ["owner-1", "owner-2", "owner-3"]
    assert (result.rounds, result.steps) == (2, 4)
    for owner in result.owners:
        assert (owner.num_rows, owner.together.num_rows) == (9, 3)
        assert owner.alone is not None
        assert owner.trained_alone is not None
        assert owner.together.loss != owner.alone.loss != owner.before.loss
        assert owner.trained_together.num_tokens == owner.trained_alone.num_tokens
        assert owner.trained_together.bytes_up > 0
        assert owner.trained_together.guarantee == "no noise: none"
    assert "masked" in result.updates
    lanes = _lanes(trace)
    assert {lane.split()[0] for lane in lanes} >= {"owner-1", "owner-2", "owner-3", "server"}
    assert not _owner_threads()


def test_threads_and_processes_learn_the_same(model: Path, tmp_path: Path) -> None:
    once = {"simulation__alone": False, "simulation__max_heldout": 1, "federation__rounds": 1}
    threads = _run(model, tmp_path, "threads", **once)
    trace = tmp_path / "trace.json"
    processes = _run(model, tmp_path, "processes", trace, simulation__processes=True, **once)
    assert processes.is_in_processes
    for one, other in zip(threads.owners, processes.owners, strict=True):
        assert other.before.loss == pytest.approx(one.before.loss, 1e-5)
        assert other.together.loss == pytest.approx(one.together.loss, 1e-4)
        assert other.trained_together.num_tokens == one.trained_together.num_tokens
        assert other.trained_together.loss_last == pytest.approx(one.trained_together.loss_last)
    assert not child_processes()
    pids = {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]}
    # The server and three owners; the parent takes no part in training.
    assert len(pids) >= 4


def test_masked_and_plain_updates_end_at_the_same_weights(model: Path, tmp_path: Path) -> None:
    once = {"simulation__alone": False}
    masked = _run(model, tmp_path, "masked", **once)
    plain = _run(model, tmp_path, "plain", federation__secure={"enabled": False}, **once)
    hidden = _run(model, tmp_path, "hidden", federation__secure={"hides_aggregate": True}, **once)
    assert "in the open" in plain.updates
    assert all(owner.alone is None for owner in masked.owners)
    for one, *others in zip(masked.owners, plain.owners, hidden.owners, strict=True):
        for other in others:
            assert other.together.loss == pytest.approx(one.together.loss, 1e-4)


@pytest.mark.parametrize("is_in_processes", [False, True])
def test_an_owner_that_fails_ends_all_with_its_error(
    model: Path, tmp_path: Path, is_in_processes: bool
) -> None:
    changes = {"train__lr": 1e30, "simulation__processes": is_in_processes}
    with pytest.raises(ConfigError, match=r"NaN|not finite"):
        _run(model, tmp_path, **changes)
    assert not child_processes()
    assert not _owner_threads()


def test_rows_that_are_no_multiple_choice_are_refused(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "same.jsonl"
    rows.write_text((json.dumps({"text": "ab", "topic": "trade"}) + "\n") * 8)
    owner = {name: {"train": str(rows), "heldout": str(rows)} for name in ("a", "b", "c")}
    with pytest.raises(ConfigError, match="have 1 different completions"):
        _run(model, tmp_path, owner=owner, simulation={})


def test_a_federation_that_needs_more_owners_is_refused_at_once(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="min_members=5 exceeds the 3 owners"):
        _run(model, tmp_path, federation__min_members=5)
    with pytest.raises(ConfigError, match="secure aggregation needs 3"):
        _run(model, tmp_path, "two", simulation__owners=2)


def test_the_command_prints_the_table_and_one_object(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "federation.json"
    values = table(model, tmp_path)
    lines = [f"{s}.{k} = {json.dumps(v)}\n" for s, t in values.items() for k, v in t.items()]  # type: ignore[attr-defined]
    config.write_text("".join(lines))
    trace = tmp_path / "trace.json"
    words = ["--set", "federation.rounds=1", "--trace", str(trace), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "cutlayer.cli.main", "simulate", str(config), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["rounds"], result["clients"]) == (1, 3)
    names = ["owner-1", "owner-2", "owner-3"]
    for key in ("accuracy_before", "accuracy_alone", "accuracy_together"):
        assert list(result[key]) == names
    assert [owner["name"] for owner in result["owners"]] == names
    assert "together" in done.stderr
    assert "seconds" in done.stderr
    assert trace.exists()


def test_the_example_is_the_demos_second_scene() -> None:
    assert load_settings(SimulationSettings, EXAMPLES / "federation.toml") == federation_settings()
