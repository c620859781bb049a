"""A small world whose server holds every block, so that a run in it can be cut anywhere.

It holds no test.
"""

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cutlayer import Client, ClientSettings, ServerSettings
from cutlayer.client.recut_desk import RecutRequest
from cutlayer.client.run_state import StepRecord
from cutlayer.model.partition import Cut
from cutlayer.settings import parse_settings
from tests.tiny_models import NUM_BLOCKS
from tests.worlds import client_settings, server_settings

__all__ = [
    "adapters_of",
    "leave_request",
    "losses_of",
    "max_rel_diff",
    "owner",
    "random_cuts",
    "wide_server",
]


def wide_server(model: Path, folder: Path, **limits: object) -> ServerSettings:
    """A trunk of all blocks."""
    table = server_settings(model, folder, **limits).model_dump(mode="json")
    table["model"] |= {"lower": 0, "upper": NUM_BLOCKS}
    return parse_settings(ServerSettings, table, "wide server")


def owner(model: Path, folder: Path, **changes: object) -> ClientSettings:
    """An owner whose sums have no order that a cut could change."""
    return client_settings(model, folder, **{"train__clip_norm": 0, **changes})


def random_cuts(seed: int, count: int) -> list[Cut]:
    """Cuts of a tiny model, no two neighbours the same."""
    draw, cuts = random.Random(seed), [Cut(1, 3)]
    every = [Cut(a, b) for a in range(NUM_BLOCKS) for b in range(a + 1, NUM_BLOCKS + 1)]
    while len(cuts) <= count:
        cuts.append(draw.choice([cut for cut in every if cut != cuts[-1]]))
    return cuts[1:]


def leave_request(folder: Path, cut: Cut, share_adapter: bool = True) -> None:
    """What `cutlayer recut` leaves, without waiting for the answer."""
    from cutlayer.client.recut_desk import _leave

    _leave(
        folder,
        RecutRequest(name="00aa", lower=cut.lower, upper=cut.upper, share_adapter=share_adapter),
    )


def adapters_of(client: Client) -> dict[str, Tensor]:
    """The newest saved adapter of all parts together."""
    step = client._state.saved_steps()[-1]
    tensors = client._state.load(step).tensors
    return {**tensors["head"], **tensors["tail"], **client.trunk.pull_adapter(client.run_id, step)}


def losses_of(history: list[StepRecord]) -> Tensor:
    """Training losses, by step."""
    return torch.tensor([record.loss for record in history], dtype=torch.float64)


def max_rel_diff(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Largest difference of any value, relative to the largest value of its tensor."""
    assert first.keys() == second.keys()
    return max(
        float((first[key] - second[key]).abs().max() / first[key].abs().max().clamp_min(1e-12))
        for key in first
    )
