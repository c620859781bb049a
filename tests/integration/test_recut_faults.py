"""Faults in the middle of a re-cut of a live run: nothing is left behind, nothing is mixed."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from cutlayer import Client
from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.errors import ModelError, StorageError
from cutlayer.model.checkpoint import load_client_parts
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Cut, Head, Tail
from cutlayer.storage.files import private_folder
from tests.recut_worlds import leave_request, losses_of, owner, wide_server
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, running_server

STEPS = 6
SMALL: dict[str, object] = {"train__steps": STEPS, "train__save_every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepRecord]:
    """History of a run that nobody asks anything of."""
    folder = private_folder(tmp_path_factory.mktemp("whole") / "world")
    with (
        running_server(wide_server(model, folder)) as server,
        client_of(server, owner(model, folder, **SMALL)) as client,
    ):
        return client.train().history


@pytest.fixture
def world(model: Path, tmp_path: Path) -> Iterator[Client]:
    """An owner who trains."""
    with (
        running_server(wide_server(model, tmp_path)) as server,
        client_of(server, owner(model, tmp_path, **SMALL)) as client,
    ):
        yield client


def _in_the_middle(client: Client, act: Callable[[], object]) -> list[StepRecord]:
    """Train, and act after the third step; its history."""

    def on_step(report: Report) -> None:
        if report.record.step == 3:
            act()

    return client.train(on_step).history


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_and_stops_no_training(
    world: Client,
    whole: list[StepRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = world.settings.run.folder

    def full(*_: object) -> None:
        assert (folder / "steps.c1").exists()
        raise StorageError("no space left on device")

    monkeypatch.setattr(world._state, "finish_recut", full)
    assert _in_the_middle(world, lambda: leave_request(folder, Cut(2, 3))) == whole
    assert not (folder / "steps.c1").exists()
    names = [path.name for path in (folder.parent / "server/runs/clinic").iterdir()]
    assert names == [world.run_id]


def test_a_training_does_not_go_on_at_the_old_cut_once_the_file_says_the_new_one(
    model: Path,
    tmp_path: Path,
    whole: list[StepRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file is in place, and then its folder cannot be synced."""
    settings = owner(model, tmp_path, **SMALL)
    with running_server(wide_server(model, tmp_path)) as server:
        with client_of(server, settings) as client:
            write_note = client._state.write_note

            def late(name: str, table: Mapping[str, str]) -> None:
                write_note(name, table)
                if "generation" in table:
                    raise StorageError("the disk is gone")

            monkeypatch.setattr(client._state, "write_note", late)
            with pytest.raises(StorageError, match="start again"):
                _in_the_middle(client, lambda: leave_request(settings.run.folder, Cut(2, 3)))
        with client_of(server, settings) as client:
            assert client.settings.model.lower == 2
            assert torch.equal(losses_of(client.train().history), losses_of(whole))


def test_a_client_whose_new_blocks_cannot_be_loaded_ends_in_order(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise ModelError("the file ends inside the tensor")

    with running_server(wide_server(model, tmp_path)) as server:
        with client_of(server, owner(model, tmp_path, **SMALL)) as client:
            client.train()
            with monkeypatch.context() as patch:
                patch.setattr("cutlayer.client.client.load_client_parts", damaged)
                with pytest.raises(ModelError, match="ends inside"):
                    client.recut(lower=2)
        with client_of(server, owner(model, tmp_path, **SMALL)) as client:
            assert client.settings.model.lower == 2
            assert client.train().step == STEPS


def test_the_parts_of_the_old_cut_leave_the_memory_before_the_new_ones_come(
    world: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = world.settings.run.folder, list[weakref.ref[torch.nn.Module]]()

    def load(folder: ModelFolder, cut: Cut, dtype: str, device: str) -> tuple[Head, Tail]:
        assert [part() for part in seen] == [None, None]
        return load_client_parts(folder, cut, dtype, device)

    monkeypatch.setattr("cutlayer.client.client.load_client_parts", load)

    def ask() -> None:
        seen.extend(weakref.ref(part) for part in (world.head, world.tail))
        leave_request(folder, Cut(2, 3))

    _in_the_middle(world, ask)
    assert world.run_id.endswith(".c1")
    assert [part() for part in seen] == [None, None]
    seen[:] = [weakref.ref(part) for part in (world.head, world.tail)]
    world.recut(lower=1, share_adapter=True)
    assert [part() for part in seen] == [None, None]


def test_a_command_that_began_before_a_recut_and_came_after_it_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = owner(model, tmp_path, **SMALL)
    with running_server(wide_server(model, tmp_path)) as server:
        with client_of(server, settings) as client:
            client.train()

        def load(folder: ModelFolder, cut: Cut, dtype: str, device: str) -> tuple[Head, Tail]:
            monkeypatch.undo()
            with client_of(server, settings) as other:
                other.recut(lower=2)
            return load_client_parts(folder, cut, dtype, device)

        monkeypatch.setattr("cutlayer.client.client.load_client_parts", load)
        with pytest.raises(StorageError, match="start again"):
            client_of(server, settings)
        with client_of(server, settings) as client:
            assert client.settings.model.lower == 2
