"""Forks of saved runs: exactly what moved changes sides, and one run is left of the two."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.errors import PermissionRefused, ProtocolError, SpecMismatch, StepExpired
from cutlayer.model.adapters import layout_of
from cutlayer.model.checkpoint import load_part
from cutlayer.model.moved_blocks import block_of
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.server.host import TrunkHost
from cutlayer.server.recut import Moved
from cutlayer.server.run_files import load_saved_adapter
from cutlayer.storage.steps import StepStore
from cutlayer.wire.messages import Commit, OpenRun, Step
from cutlayer.wire.recut_messages import Recut, fork_id
from tests.tiny_models import tiny_llama_folder
from tests.unit.server.trunk_world import SETTINGS, opening, tiny_host

OLD = Cut(1, 3)
NOTHING = Moved(weights={}, moments={})


def _host(tmp_path: Path, **limits: object) -> tuple[TrunkHost, Trunk]:
    trunk = load_part(tiny_llama_folder(tmp_path), Cut(0, 4), Part.TRUNK)
    assert isinstance(trunk, Trunk)
    return tiny_host(tmp_path, trunk, **limits), trunk


def _opened(host: TrunkHost, run_id: str = "run", cut: Cut = OLD, steps: object = (0,)) -> OpenRun:
    opened = opening(run_id)
    assert isinstance(steps, tuple)
    opened.saved_steps.extend(step for step in steps if step not in opened.saved_steps)
    host.open_run("clinic", opened, cut)
    return opened


def _train(host: TrunkHost, run_id: str, step: int) -> None:
    """One optimizer step on a gradient of ones, saved."""
    run = host._runs["clinic", run_id]
    for parameter in run._adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    run._trunk_sq_norm, run._needs_backward = 1.0, False
    done = Step(step=step, client_sq_norm=0.0, num_tokens=1, lr=0.1)
    host.commit("clinic", Commit(run_id=run_id, commit=done, save=True, step=step))


def _call(cut: Cut, run_id: str = "run", step: int = 1, pin: bool = False) -> Recut:
    lower, upper = cut.lower, cut.upper
    return Recut(
        run_id=run_id, new_run_id=fork_id(run_id), step=step, lower=lower, upper=upper, pin=pin
    )


def _fork(host: TrunkHost, cut: Cut, came: Moved = NOTHING, run_id: str = "run") -> Moved:
    return host.recut("clinic", _call(cut, run_id), came, lambda: None)


def _blocks(state: Mapping[str, Tensor]) -> set[int]:
    return {block_of(key) for key in state}


def _store(tmp_path: Path, run_id: str) -> StepStore:
    return StepStore(tmp_path / "state" / "runs" / "clinic" / run_id)


def _names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "state" / "runs" / "clinic").iterdir())


def test_a_block_goes_to_the_client_with_its_moments_and_comes_back(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    before = load_saved_adapter(_store(tmp_path, "run"), 1).state
    went = _fork(host, Cut(2, 3))
    assert (_blocks(went.weights), len(went.moments)) == ({1}, 3 * len(went.weights))
    assert all(torch.equal(before[key], x) for key, x in went.weights.items())
    left = load_saved_adapter(_store(tmp_path, "run.c1"), 1).state
    assert (_blocks(left), load_saved_adapter(_store(tmp_path, "run.c1"), 1).cut) == (
        {2},
        Cut(2, 3),
    )
    _opened(host, "run.c1", Cut(2, 3), (0, 1))
    assert _fork(host, OLD, went, "run.c1") == NOTHING
    again = load_saved_adapter(_store(tmp_path, "run.c2"), 1).state
    assert sorted(again) == sorted(before)
    assert all(torch.equal(before[key], x) for key, x in again.items())
    assert _opened(host, "run.c2", OLD, (0, 1))
    assert host._runs["clinic", "run.c2"].step == 1


def test_opening_the_fork_deletes_what_it_was_made_from(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    _fork(host, Cut(2, 3))
    assert _names(tmp_path) == ["run", "run.c1"]
    _opened(host, "run.c1", Cut(2, 3), (0, 1))
    assert _names(tmp_path) == ["run.c1"]
    assert [name for _, name, _ in host.runs()] == ["run.c1"]


def test_opening_the_old_run_deletes_a_fork_that_nobody_opened(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    _fork(host, Cut(2, 3))
    _opened(host, steps=(0, 1))
    assert _names(tmp_path) == ["run"]


def test_a_fork_that_was_trained_is_not_deleted_by_an_old_copy_of_its_owner(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    _fork(host, Cut(2, 3))
    _opened(host, "run.c1", Cut(2, 3), (0, 1))
    _train(host, "run.c1", 2)
    _opened(host)
    assert _names(tmp_path) == ["run", "run.c1"]


def test_a_repeated_fork_is_the_same_and_one_of_another_cut_takes_its_place(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    first, second = _fork(host, Cut(2, 3)), _fork(host, Cut(2, 3))
    assert all(torch.equal(first.weights[key], second.weights[key]) for key in first.weights)
    _fork(host, Cut(1, 2))
    assert load_saved_adapter(_store(tmp_path, "run.c1"), 1).cut == Cut(1, 2)
    assert _store(tmp_path, "run.c1").steps() == [1]


def test_what_cannot_be_forked_is_refused_and_the_run_is_as_it_was(tmp_path: Path) -> None:
    host, trunk = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    fresh = {key: torch.zeros(shape) for key, shape in layout_of(trunk, SETTINGS, range(1)).items()}
    arriving = Moved(weights=fresh, moments={})
    with pytest.raises(StepExpired, match="no step 7"):
        host.recut("clinic", _call(Cut(2, 3), step=7), NOTHING, lambda: None)
    with pytest.raises(StepExpired, match="no step 1"):
        host.recut("other", _call(Cut(2, 3)), NOTHING, lambda: None)
    with pytest.raises(ProtocolError, match="other weights"):
        _fork(host, Cut(0, 3))
    with pytest.raises(ProtocolError, match="other weights"):
        _fork(host, Cut(2, 3), arriving)
    renamed = Recut(run_id="run", new_run_id="other", step=1, lower=2, upper=3)
    with pytest.raises(ProtocolError, match=r"run\.c1"):
        host.recut("clinic", renamed, NOTHING, lambda: None)
    assert _names(tmp_path) == ["run"]
    assert _blocks(_fork(host, Cut(0, 2), arriving).weights) == {2}


def test_a_cut_outside_of_the_trunk_is_refused(tmp_path: Path) -> None:
    host = tiny_host(tmp_path)
    host.open_run("clinic", opening())
    call = _call(Cut(0, 3), step=0)
    with pytest.raises(SpecMismatch, match="1:3"):
        host.recut("clinic", call, NOTHING, lambda: None)


def test_private_weights_are_asked_for_before_anything_is_saved(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)

    def refuse() -> None:
        raise PermissionRefused("no consent")

    with pytest.raises(PermissionRefused, match="no consent"):
        host.recut("clinic", _call(Cut(2, 3)), NOTHING, refuse)
    assert _names(tmp_path) == ["run"]


def test_a_fork_needs_no_room_of_its_own_but_a_second_run_s_does(tmp_path: Path) -> None:
    host, _ = _host(tmp_path, max_client_stored_runs=1)
    _opened(host)
    _train(host, "run", 1)
    _fork(host, Cut(2, 3))
    with pytest.raises(PermissionRefused, match="limit"):
        _opened(host, "second")


def _forked_twice_unopened(host: TrunkHost) -> None:
    """The owner became run.c1 and then run.c2 without opening either."""
    _opened(host)
    _train(host, "run", 1)
    _fork(host, Cut(2, 3))
    host.recut("clinic", _call(OLD, "run.c1"), _zeros(host), lambda: None)


def _zeros(host: TrunkHost) -> Moved:
    layout = layout_of(host._trunk, SETTINGS, range(1, 2))
    return Moved(weights={key: torch.zeros(shape) for key, shape in layout.items()}, moments={})


def test_forking_a_fork_tells_that_its_owner_has_become_it(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _forked_twice_unopened(host)
    assert _names(tmp_path) == ["run.c1", "run.c2"]
    assert host.runs() == []
    # A second step is forked into the same fork.
    host.recut("clinic", _call(OLD, "run.c1"), _zeros(host), lambda: None)
    assert _names(tmp_path) == ["run.c1", "run.c2"]
    _fork(host, Cut(2, 3), run_id="run.c2")
    assert _names(tmp_path) == ["run.c2", "run.c3"]


def test_a_fork_that_is_only_generated_from_or_exported_takes_its_parent_s_place(
    tmp_path: Path,
) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    _fork(host, Cut(2, 3))
    assert _blocks(host.pull_adapter("clinic", "run.c1", 1)) == {2}
    assert _names(tmp_path) == ["run.c1"]
    assert host.runs() == []


def test_a_deletion_that_was_killed_is_finished_and_stands_in_nobody_s_way(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    _fork(host, Cut(2, 3))
    left = tmp_path / "state/runs/clinic/.run.c1.cutlayer-tmp"
    left.mkdir()
    (left / "state.json").write_bytes(b"{}")
    _fork(host, Cut(1, 2))
    assert not left.exists()
    left.mkdir()
    (left / "state.json").write_bytes(b"{}")
    _opened(host, steps=(0, 1))
    assert not left.exists()
    assert _names(tmp_path) == ["run"]


def test_a_fork_of_which_a_full_disk_left_no_step_is_forgotten(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    _train(host, "run", 1)
    StepStore(tmp_path / "state/runs/clinic/run.c1")
    _opened(host, steps=(0, 1))
    assert _names(tmp_path) == ["run"]


def test_a_run_whose_fork_would_have_too_long_a_name_can_be_opened(tmp_path: Path) -> None:
    host, _ = _host(tmp_path)
    name = "a" * 100
    _opened(host, name)
    with pytest.raises(ProtocolError, match="no name"):
        host.recut("clinic", _call(Cut(2, 3), name, 0), NOTHING, lambda: None)
    assert _names(tmp_path) == [name]


def test_a_run_that_its_owner_named_as_a_fork_is_neither_deleted_nor_overwritten(
    tmp_path: Path,
) -> None:
    host, _ = _host(tmp_path)
    _opened(host, "run.c1")
    _train(host, "run.c1", 1)
    _opened(host)
    _train(host, "run", 1)
    with pytest.raises(ProtocolError, match=r"another run run\.c1"):
        _fork(host, Cut(2, 3))
    _opened(host, "run.c1", steps=(0, 1))
    _opened(host, steps=(0, 1))
    assert _names(tmp_path) == ["run", "run.c1"]


def test_forks_do_not_fill_the_disk(tmp_path: Path) -> None:
    host, _ = _host(tmp_path, max_client_stored_runs=3, max_client_runs=3)
    for name in ("a", "b", "c"):
        _opened(host, name)
    host.recut("clinic", _call(Cut(2, 3), "a", 0), NOTHING, lambda: None)
    host.recut("clinic", _call(Cut(1, 2), "a", 0), NOTHING, lambda: None)
    with pytest.raises(PermissionRefused, match="limit"):
        host.recut("clinic", _call(Cut(2, 3), "b", 0), NOTHING, lambda: None)
    assert _names(tmp_path) == ["a", "a.c1", "b", "c"]


@pytest.mark.parametrize("name", ["..", "a/../../other/run", "../other/run", "", "a\n", ".run"])
def test_no_name_leads_out_of_the_owner_s_folder(tmp_path: Path, name: str) -> None:
    host, _ = _host(tmp_path)
    _opened(host)
    with pytest.raises((ProtocolError, StepExpired)):
        host.recut("clinic", _call(Cut(2, 3), name), NOTHING, lambda: None)
    assert [path.name for path in (tmp_path / "state" / "runs").iterdir()] == ["clinic"]
    assert _names(tmp_path) == ["run"]
