"""What the driver of the unsplit script asks, and how it says what went wrong."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file

from cutlayer.errors import ConfigError, StorageError
from cutlayer.suite import central
from cutlayer.suite.central import run_central
from cutlayer.suite.centralised import __main__ as script
from cutlayer.suite.centralised import tie
from cutlayer.suite.spec import Method
from tests.tiny_models import tiny_llama_folder
from tests.unit.suite.tiny_tasks import ONE_THREAD, tiny_replies, tiny_spec, tiny_task


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script without a process, which takes seconds to start."""

    def run(folder: Path, threads: int) -> None:
        script.main([str(folder / "request.json"), str(folder / "response.json")])

    monkeypatch.setattr(central, "_run_script", run)


@pytest.mark.usefixtures("in_this_process")
def test_an_untuned_model_answers_without_a_step(tmp_path: Path) -> None:
    spec = tiny_spec(tiny_llama_folder(tmp_path), Method.UNTUNED)
    task = tiny_task(tmp_path / "task", num_train=0)
    found = run_central(spec, task, tmp_path / "run", ONE_THREAD, None)
    assert (found.losses, found.num_train_tokens) == ((), 0)
    assert [len(answer.log_likelihoods) for answer in found.predictions] == [2, 2, 2, 2]
    assert found.score_seconds > 0
    assert not (tmp_path / "run" / "unsplit" / "adapter_model.safetensors").exists()


@pytest.mark.usefixtures("in_this_process")
def test_training_moves_the_untuned_model_and_another_seed_elsewhere(tmp_path: Path) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    untuned = tiny_spec(model, Method.UNTUNED)
    trained = msgspec.structs.replace(untuned, method=Method.CENTRALISED)
    other = msgspec.structs.replace(trained, seed=2)
    runs = [
        run_central(s, task, tmp_path / s.run_id, ONE_THREAD, None)
        for s in (untuned, trained, other)
    ]
    likelihoods = [[answer.log_likelihoods for answer in run.predictions] for run in runs]
    assert likelihoods[0] != likelihoods[1] != likelihoods[2]
    assert runs[1].losses[-1] < runs[1].losses[0]
    again = run_central(trained, task, tmp_path / "again", ONE_THREAD, None)
    assert again.losses == runs[1].losses


@pytest.mark.usefixtures("in_this_process")
def test_the_cut_of_the_spec_changes_nothing(tmp_path: Path) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    spec = tiny_spec(model, Method.CENTRALISED, steps=1)
    elsewhere = msgspec.structs.replace(spec, head_blocks=2, tail_blocks=1)
    for name, run in (("one", spec), ("two", elsewhere)):
        run_central(run, task, tmp_path / name, ONE_THREAD, None)
    one, two = (
        load_file(tmp_path / name / "unsplit" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)


@pytest.mark.usefixtures("in_this_process")
def test_a_loss_that_is_no_number_ends_the_run_with_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    spec = tiny_spec(model, Method.CENTRALISED, lr=1e30)
    with pytest.raises(SystemExit, match="2"):
        run_central(spec, task, tmp_path / "run", ONE_THREAD, None)
    assert "error: the loss of step 2 is nan; lower the learning rate" in capsys.readouterr().err


def test_what_the_script_refuses_reaches_the_user(tmp_path: Path) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_replies(tmp_path / "task")
    line = json.loads(task.test.read_text().splitlines()[1])
    # Longer than any context of this model.
    wrong = json.dumps({**line, "max_new_tokens": 1000})
    task.test.write_text(f"{task.test.read_text().splitlines()[0]}\n{wrong}\n")
    spec = tiny_spec(model, Method.UNTUNED)
    with pytest.raises(ConfigError, match=r"^unsplit training: .*test\.jsonl:2: longer than the"):
        run_central(spec, task, tmp_path / "run", ONE_THREAD, None)


def test_sparse_tuning_has_no_counterpart(tmp_path: Path) -> None:
    spec = tiny_spec(tiny_llama_folder(tmp_path), Method.CENTRALISED, adapter="sparse")
    with pytest.raises(ConfigError, match="no counterpart of the adapter 'sparse'"):
        run_central(spec, tiny_task(tmp_path / "task"), tmp_path / "run", ONE_THREAD, None)


def test_a_cut_that_leaves_no_trunk_is_refused(tmp_path: Path) -> None:
    spec = tiny_spec(tiny_llama_folder(tmp_path), Method.CENTRALISED, head_blocks=3)
    with pytest.raises(ConfigError, match="lower=3"):
        run_central(spec, tiny_task(tmp_path / "task"), tmp_path / "run", ONE_THREAD, None)


@pytest.mark.usefixtures("in_this_process")
def test_fewer_answers_than_questions_are_never_scored(tmp_path: Path) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    lines = task.test.read_text().splitlines()
    task.test.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(StorageError, match="answered 3 of 4 questions"):
        run_central(tiny_spec(model, Method.UNTUNED), task, tmp_path / "run", ONE_THREAD, None)


@pytest.mark.parametrize("raw", [b"", b'{"losses": [', b'{"losses": [NaN]}', b"\xff"])
def test_a_damaged_answer_is_named(
    tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    monkeypatch.setattr(
        central,
        "_run_script",
        lambda folder, threads: (folder / "response.json").write_bytes(raw),
    )
    with pytest.raises(StorageError, match=r"response\.json is damaged.*run it again"):
        run_central(tiny_spec(model, Method.UNTUNED), task, tmp_path / "run", ONE_THREAD, None)


def test_a_fault_of_the_script_is_named_and_its_words_stay_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    for status, words in ((1, r"status 1 (ValueError); "), (-9, "signal 9; if memory ran out")):
        log.write_text("Traceback\n  one\nValueError: a private text\n")
        error = str(central._explain(status, log))
        assert words in error
        assert "private" not in error
        assert str(tmp_path) not in error
        assert "a private text" in capsys.readouterr().err
    log.write_text("a private text\n")
    assert str(central._explain(1, log)).endswith("status 1; the run's log has more")


def test_the_script_ends_when_whoever_asked_is_gone() -> None:
    """Its stdin is a pipe that the asking process holds open."""
    waits = f"import time; from {tie.__name__} import end_with_stdin; end_with_stdin()\n"
    command = [sys.executable, "-P", "-c", f"{waits}time.sleep(300)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == tie.LEFT_ALONE
