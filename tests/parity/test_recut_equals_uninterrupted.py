"""A run whose cut moves again and again learns what an uninterrupted one learns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.model.partition import Cut
from cutlayer.storage.files import private_folder
from tests.recut_worlds import (
    adapters_of,
    leave_request,
    losses_of,
    max_rel_diff,
    owner,
    random_cuts,
    wide_server,
)
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, running_server

STEPS, NUM_RECUTS = 200, 20
TINY = {"train__steps": STEPS, "train__rows_per_step": 1, "train__save_every": 9}


def _trained(
    model: Path, folder: Path, cuts: dict[int, Cut], **changes: object
) -> tuple[list[StepRecord], dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
    """History, adapters, evaluations and the exported adapter of a run that is re-cut."""
    settings = owner(model, private_folder(folder), **{**TINY, **changes})
    run = settings.run.folder

    def ask(report: Report) -> None:
        if report.record.step in cuts:
            leave_request(run, cuts[report.record.step])

    with (
        running_server(wide_server(model, folder)) as server,
        client_of(server, settings) as client,
    ):
        progress = client.train(ask)
        if cuts:
            last = cuts[max(cuts)]
            assert client.run_id.endswith(f".c{len(cuts)}")
            assert (client.settings.model.lower, client.settings.model.upper) == (
                last.lower,
                last.upper,
            )
        client.export(folder / "adapter")
        files = sorted((folder / "adapter").rglob("*.safetensors"))
        exported = {f"{f.name} {key}": x for f in files for key, x in load_file(f).items()}
        return progress.history, adapters_of(client), progress.evaluations, exported


def _when(cuts: list[Cut], steps: int) -> dict[int, Cut]:
    return {(index + 1) * steps // (len(cuts) + 1): cut for index, cut in enumerate(cuts)}


def test_twenty_random_recuts_of_two_hundred_steps_change_no_bit(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    whole = _trained(model, tmp_path / "whole", {})
    moved = _trained(model, tmp_path / "moved", _when(random_cuts(3, NUM_RECUTS), STEPS))
    assert torch.equal(losses_of(moved[0]), losses_of(whole[0]))
    for first, second in ((whole[1], moved[1]), (whole[3], moved[3])):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    names = sorted(path.name for path in (tmp_path / "moved/server/runs/clinic").iterdir())
    assert len(names) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"train__clip_norm": 0.05, "adapter__train_a": False},
        {"adapter__kinds": ["lora", "prefix"], "adapter__prefix": {"num_virtual_tokens": 3}},
        {"adapter__kinds": ["sparse"]},
    ],
    ids=["clipped", "prefix", "sparse"],
)
def test_every_kind_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    model = tiny_llama_folder(tmp_path)
    few = {"train__steps": 8, "train__rows_per_step": 2, **changes}
    whole = _trained(model, tmp_path / "whole", {}, **few)
    moved = _trained(model, tmp_path / "moved", _when(random_cuts(5, 3), 8), **few)
    # The clip's norm is summed part by part, so its last bit depends on the cut.
    assert torch.allclose(losses_of(moved[0]), losses_of(whole[0]), rtol=1e-6, atol=0)
    assert max_rel_diff(whole[1], moved[1]) < 1e-6
    assert max_rel_diff(whole[3], moved[3]) < 1e-6


def test_the_best_step_moves_with_the_run_and_is_what_generates(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    changes: dict[str, object] = {
        "train__steps": 12,
        "train__eval_every": 2,
        "train__lr": 0.3,
        "data__validation_fraction": 0.25,
    }
    whole = _trained(model, tmp_path / "whole", {}, **changes)
    moved = _trained(model, tmp_path / "moved", _when([Cut(2, 4), Cut(0, 2)], 12), **changes)
    assert moved[2] == whole[2]
    assert moved[3].keys() == whole[3].keys()
    assert all(torch.equal(whole[3][key], moved[3][key]) for key in whole[3])
    assert json.loads((tmp_path / "moved/adapter/adapter_config.json").read_text())
