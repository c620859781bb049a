"""The two headers with which blocks of a saved run change sides; the spec is docs/wire.md.

It moves nothing (`client.recut`, `server.recut`). A re-cut makes a new run at the server and leaves
the old one as it is, so RECUT may be repeated: it writes the same again.

Tensors of both frames: `adapter/KEY` is a weight of a block that changes sides, `moment/KEY.NAME`
what its optimizer keeps of it (exp_avg, exp_avg_sq, step). Keys carry global block indices.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from cutlayer.wire.header import Header

__all__ = ["Recut", "RecutDone", "fork_id", "named_tensors", "parent_id", "split_tensors"]

T = TypeVar("T")
_ADAPTER, _MOMENT = "adapter/", "moment/"
_FORK = re.compile(r"(?P<root>.+)\.c(?P<number>[1-9][0-9]{0,8})")


class Recut(Header, frozen=True, kw_only=True):
    """Make a saved step of a run the first one of a new run with another cut.

    Tensors: weights and moments of the blocks that come to the server."""

    run_id: str
    """The run that is forked; it stays as it is."""
    new_run_id: str
    """`fork_id` of it."""
    step: int
    """A step of it that the server has saved."""
    lower: int
    """First block of the new run's trunk."""
    upper: int
    """First block behind it."""
    pin: bool = False
    """Keep this step beside the newest ones, as in `Commit`."""


class RecutDone(Header, frozen=True, kw_only=True):
    """The new run is saved. Tensors: weights and moments of the blocks that go to the client."""

    step: int


def fork_id(run_id: str) -> str:
    """What a run is called at the server after one more re-cut: NAME, NAME.c1, NAME.c2, ..."""
    match = _FORK.fullmatch(run_id)
    if match is None:
        return f"{run_id}.c1"
    return f"{match['root']}.c{int(match['number']) + 1}"


def parent_id(run_id: str) -> str | None:
    """What a run was called before its last re-cut; None where its name tells of none."""
    match = _FORK.fullmatch(run_id)
    if match is None:
        return None
    before = int(match["number"]) - 1
    return f"{match['root']}.c{before}" if before else match["root"]


def named_tensors(weights: Mapping[str, T], moments: Mapping[str, T]) -> dict[str, T]:
    """Tensors of a frame, by name."""
    return {_ADAPTER + key: x for key, x in weights.items()} | {
        _MOMENT + key: x for key, x in moments.items()
    }


def split_tensors(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]] | None:
    """What `named_tensors` joined; None where a name is neither's."""
    weights = {k.removeprefix(_ADAPTER): x for k, x in tensors.items() if k.startswith(_ADAPTER)}
    moments = {k.removeprefix(_MOMENT): x for k, x in tensors.items() if k.startswith(_MOMENT)}
    return (weights, moments) if len(weights) + len(moments) == len(tensors) else None
