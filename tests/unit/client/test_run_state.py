"""A run's folder around a re-cut: the old run or the new one, wherever the process ends."""

from pathlib import Path

import pytest
import torch

from cutlayer.client import run_state
from cutlayer.client.run_file import saved_cut
from cutlayer.client.run_state import Progress, RunState
from cutlayer.client.settings import RunSettings
from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.partition import Cut
from cutlayer.storage.files import write_atomic
from cutlayer.storage.vault import new_key_file

IDENTITY = {"cut": "1:3", "model": "old", "data": "rows"}


class _Killed(Exception):
    """Stands for the end of the process."""


def _settings(folder: Path, *, sealed: bool = False) -> RunSettings:
    key = folder / "storage.key"
    if sealed and not key.exists():
        new_key_file(key)
    return RunSettings(folder=folder / "run", key_file=key if sealed else None)


def _opened(settings: RunSettings) -> RunState:
    state = RunState(settings)
    state.claim(IDENTITY if state.cut != Cut(2, 3) else {**IDENTITY, "cut": "2:3", "model": "new"})
    return state


def _save(state: RunState, step: int, value: float) -> None:
    tensors = {"head": {"w": torch.tensor([value])}, "tail": {}}
    state.save(Progress(step=step), tensors, is_pinned=False)


def _recut(state: RunState) -> None:
    steps = state.begin_recut()
    for step in (4, 8):
        steps.save(Progress(step=step), {"head": {"w": torch.tensor([-1.0])}, "tail": {}}, False)
    state.finish_recut(Cut(2, 3), {"model": "new"})


def _value(state: RunState) -> float:
    return float(state.load(8).tensors["head"]["w"])


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_a_recut_run_has_its_new_steps_name_and_cut(tmp_path: Path, sealed: bool) -> None:
    settings = _settings(tmp_path, sealed=sealed)
    state = _opened(settings)
    first = state.run_id
    _save(state, 6, 1.0)
    _save(state, 8, 1.0)
    assert saved_cut(settings) is None
    _recut(state)
    assert (state.run_id, state.cut, state.saved_steps()) == (f"{first}.c1", Cut(2, 3), [4, 8])
    _recut(state)
    state.close()
    again = _opened(settings)
    assert (again.run_id, saved_cut(settings)) == (f"{first}.c2", Cut(2, 3))
    assert _value(again) == -1.0
    assert sorted(p.name for p in (tmp_path / "run").glob("*steps*")) == ["steps"]
    again.close()


@pytest.mark.parametrize("boundary", range(9))
def test_wherever_it_ends_the_run_is_the_old_one_or_the_new_one(
    tmp_path: Path, boundary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before, and after, each of its changes to the folder."""
    settings = _settings(tmp_path)
    state = _opened(settings)
    _save(state, 8, 1.0)
    first, count = state.run_id, 0

    def counted(change: object) -> object:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == boundary:
                raise _Killed
            result = change(*args, **kwargs)  # type: ignore[operator]
            count += 1
            if count == boundary:
                raise _Killed
            return result

        return run

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "write_atomic", counted(write_atomic))
        patch.setattr(run_state, "_remove", counted(run_state._remove))
        patch.setattr(run_state.shutil, "rmtree", counted(run_state.shutil.rmtree))
        try:
            _recut(state)
            finished = True
        except _Killed:
            finished = False
        state.close()
    assert finished == (count < boundary or boundary == 0)
    state = _opened(settings)
    is_new = state.cut == Cut(2, 3)
    assert state.run_id == (f"{first}.c1" if is_new else first)
    assert _value(state) == (-1.0 if is_new else 1.0)
    assert sorted(p.name for p in (tmp_path / "run").glob("*steps*")) == ["steps"]
    state.close()


def test_a_write_that_fails_at_its_very_end_has_decided_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is in place, and then the folder cannot be synced."""
    state = _opened(_settings(tmp_path))
    _save(state, 8, 1.0)
    first = state.run_id

    def late(path: Path, data: bytes) -> None:
        write_atomic(path, data)
        raise StorageError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "write_atomic", late)
        with pytest.raises(StorageError, match="the disk is gone"):
            _recut(state)
    assert (state.run_id, state.cut) == (f"{first}.c1", Cut(2, 3))
    state.close()
    state = _opened(_settings(tmp_path))
    assert (state.run_id, _value(state)) == (f"{first}.c1", -1.0)
    state.close()


def test_steps_that_no_recut_finished_are_forgotten(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    state = _opened(settings)
    _save(state, 8, 1.0)
    state.begin_recut().save(Progress(step=7), {"head": {}, "tail": {}}, False)
    state.close()
    state = _opened(settings)
    assert (state.saved_steps(), state.cut) == ([8], Cut(1, 3))
    assert not (tmp_path / "run" / "steps.c1").exists()
    state.close()


def test_another_cut_in_the_settings_is_refused_and_the_command_is_named(tmp_path: Path) -> None:
    state = _opened(_settings(tmp_path))
    with pytest.raises(ConfigError, match=r"other cut.*cutlayer recut"):
        state.claim({**IDENTITY, "cut": "2:3"})
    state.close()


def test_a_cut_that_is_none_is_a_damaged_file(tmp_path: Path) -> None:
    state = _opened(_settings(tmp_path))
    state.write_note("run.json", {"run_id": "x", "generation": "1", "cut": "one:two"})
    state.close()
    with pytest.raises(StorageError, match="restore it"):
        saved_cut(_settings(tmp_path))
