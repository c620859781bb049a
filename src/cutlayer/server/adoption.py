"""A federation's trunk adapter as a saved step of a member's own run, to generate and export from.

It does not aggregate (`federation`) nor load it on the trunk (`host` does, when a session opens).
"""

from pathlib import Path

from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.model.cut import Cut
from cutlayer.server.run_files import run_folder, step_files
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import Vault

__all__ = ["adopt"]


def adopt(
    state_folder: Path,
    vault: Vault,
    owner: str,
    run_id: str,
    step: int,
    settings: AdapterSettings,
    state: AdapterState,
    cut: Cut | None = None,
) -> None:
    """Write the step, of the owner's cut; done again, it writes the same.

    Raises:
        ProtocolError: a run name that is not a plain file name.
    """
    store = StepStore(run_folder(state_folder, owner, run_id), vault)
    if step not in store.steps():
        adapter = settings.model_dump(mode="json")
        store.save(step, step_files(step, cut, adapter, state, {}), is_pinned=False)
