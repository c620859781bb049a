"""A run's folder at the server and the files of a saved step. It does not decide when to save."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from cutlayer.errors import ProtocolError, StorageError
from cutlayer.model.adapters import AdapterState
from cutlayer.model.cut import Cut
from cutlayer.model.tensor_file import read_tensors
from cutlayer.storage.steps import StepStore

__all__ = [
    "MAX_NAME_LENGTH",
    "SavedAdapter",
    "check_cut",
    "cut_of",
    "load_saved_adapter",
    "run_folder",
    "step_files",
]

MAX_NAME_LENGTH = 100
"""Of a run or an owner, in characters."""
_PLAIN_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME_LENGTH - 1}}}")


def step_files(
    step: int,
    cut: Cut | None,
    adapter: Mapping[str, object],
    state: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    forked_from: str | None = None,
) -> dict[str, bytes]:
    """Contents by file name.

    Args:
        step: the finished step.
        cut: whose trunk the adapter is of; None where it is that of the only cut there was.
        adapter: the run's adapter settings, as plain values.
        state: the trunk's adapter.
        moments: of its optimizer; empty where the next step starts it afresh.
        forked_from: the run whose re-cut made this one, if that was the last thing that happened.
    """
    about: dict[str, object] = {"step": step, "adapter": dict(adapter)}
    if cut is not None:
        about["cut"] = [cut.lower, cut.upper]
    if forked_from is not None:
        about["forked_from"] = forked_from
    return {
        "state.json": json.dumps(about, sort_keys=True).encode(),
        "adapter.safetensors": save(dict(state)),
        "optimizer.safetensors": save(dict(moments)),
    }


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """The trunk adapter of a saved step."""

    settings: dict[str, object]
    """As plain values."""
    cut: Cut | None
    """As `cut_of` reads it."""
    state: AdapterState


def load_saved_adapter(store: StepStore, step: int) -> SavedAdapter:
    """The trunk adapter that a saved step holds."""
    files = store.load(step)
    about = json.loads(files["state.json"])
    state = read_tensors(files, "adapter.safetensors")
    return SavedAdapter(settings=about["adapter"], cut=cut_of(about), state=state)


def cut_of(about: Mapping[str, object]) -> Cut | None:
    """What `state.json` says of the cut; None where an older release saved it, for the only one
    that it had."""
    found = about.get("cut")
    return None if not isinstance(found, list) else Cut(*found)


def check_cut(run_id: str, saved: Cut | None, cut: Cut) -> None:
    """Refuse a saved run at another cut than its own.

    Raises:
        StorageError: says both cuts.
    """
    if saved is not None and saved != cut:
        raise StorageError(
            f"run {run_id} was cut at {saved.lower}:{saved.upper} here and is opened at "
            f"{cut.lower}:{cut.upper}; put the old cut back, or move it with `cutlayer recut`"
        )


def run_folder(state_folder: Path, owner: str, run_id: str) -> Path:
    """Where the server keeps a run: one folder per owner, so that names cannot meet.

    Raises:
        ProtocolError: a name that is not a plain file name.
    """
    for name in (owner, run_id):
        if not _PLAIN_NAME.fullmatch(name):
            raise ProtocolError(
                f"{name!r} is no name for a run or an owner: letters, digits, - _ ."
            )
    return state_folder / "runs" / owner / run_id
