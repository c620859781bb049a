"""The files of a saved step of a run at the server. It does not decide when to save."""

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

__all__ = ["step_files"]


def step_files(
    step: int,
    adapter: Mapping[str, object],
    state: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
) -> dict[str, bytes]:
    """Contents by file name.

    Args:
        step: the finished step.
        adapter: the run's adapter settings, as plain values.
        state: the trunk's adapter.
        moments: of its optimizer; empty where the next step starts it afresh.
    """
    about = {"step": step, "adapter": dict(adapter)}
    return {
        "state.json": json.dumps(about, sort_keys=True).encode(),
        "adapter.safetensors": save(dict(state)),
        "optimizer.safetensors": save(dict(moments)),
    }
