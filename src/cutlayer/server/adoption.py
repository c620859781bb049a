"""A federation's trunk adapter as a saved step of a member's own run, to generate and export from.

It does not aggregate (`federation`) nor load it on the trunk (`host` does, when a session opens).
"""

from pathlib import Path

from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.server.run_files import step_files
from cutlayer.server.runs import run_folder
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
) -> None:
    """Write the step; done again, it writes the same.

    Raises:
        ProtocolError: a run name that is not a plain file name.
    """
    store = StepStore(run_folder(state_folder, owner, run_id), vault)
    if step not in store.steps():
        adapter = settings.model_dump(mode="json")
        store.save(step, step_files(step, adapter, state, {}), is_pinned=False)
