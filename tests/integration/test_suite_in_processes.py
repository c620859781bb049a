"""The suite's owner as a process: the same losses as a thread, and memory of its own."""

from pathlib import Path

import msgspec
import pytest

from cutlayer.errors import ModelError, ProtocolError
from cutlayer.simulation.settings_text import settings_text
from cutlayer.suite.owner_process import main, read_trained, train_in_own_process
from cutlayer.suite.recipe import open_model
from cutlayer.suite.sides import Place, owner_settings
from cutlayer.suite.spec import Method
from cutlayer.suite.split import run_split
from tests.tiny_models import tiny_llama_folder
from tests.unit.suite.tiny_tasks import ONE_THREAD, tiny_spec, tiny_task


def test_processes_learn_what_threads_learn(tmp_path: Path) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    spec = tiny_spec(model, Method.SPLIT)
    threads = run_split(spec, task, tmp_path / "threads", ONE_THREAD, None)
    apart = msgspec.structs.replace(spec, in_processes=True)
    processes = run_split(apart, task, tmp_path / "processes", ONE_THREAD, None)
    assert processes.losses == pytest.approx(threads.losses, rel=1e-6)
    for ours, theirs in zip(processes.predictions, threads.predictions, strict=True):
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, rel=1e-4)
    assert processes.bytes_up == pytest.approx(threads.bytes_up, rel=0.05)
    assert processes.num_train_tokens == threads.num_train_tokens
    assert processes.peak_client_bytes is not None
    assert 50e6 < processes.peak_client_bytes < 4e9


def test_what_ends_an_owner_s_process_is_told(tmp_path: Path) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    spec = tiny_spec(model, Method.SPLIT)
    place = Place(folder=tmp_path, model=open_model(spec, None), compute=ONE_THREAD)
    owner = owner_settings(spec, task, place)
    gone = owner.model.model_copy(update={"path": str(tmp_path / "gone")})
    config, result = tmp_path / "owner.toml", tmp_path / "owner.json"
    config.write_text(settings_text(owner.model_copy(update={"model": gone})))
    # As its process does; its parent raises what it reads.
    assert main([str(config), str(result)]) == 1
    with pytest.raises(ModelError, match="gone"):
        read_trained(result)


def test_an_owner_that_dies_without_a_word_is_told_without_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, task = tiny_llama_folder(tmp_path), tiny_task(tmp_path / "task")
    spec = tiny_spec(model, Method.SPLIT)
    place = Place(folder=tmp_path, model=open_model(spec, None), compute=ONE_THREAD)
    dies = tmp_path / "python"
    dies.write_text("#!/bin/sh\necho 'ValueError: a private text' >&2\nexit 7\n")
    dies.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(dies))
    with pytest.raises(ProtocolError, match=r"exit code 7; the run's log has more$"):
        train_in_own_process(owner_settings(spec, task, place), tmp_path)
    assert "a private text" in capfd.readouterr().err
