"""Utilities that were measured under noise, to compare a plan with.

It computes no utility and fits no curve: where nothing like the plan was run, it says nothing.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError

__all__ = ["RecordedRun", "comparable_runs", "load_recorded"]

_FACTOR = 2.0
"""Scales further apart than this are not comparable."""


class RecordedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run that was measured."""

    mechanism: str
    scale: float | None
    clip: float | None
    withhold: str
    cut: tuple[int, int]
    """First blocks of trunk and tail."""
    task: str
    score: float
    """Of the task, in its own unit."""
    score_without_noise: float
    recovery: float | None = None
    """Share of private tokens that the best attack recovered, 0 to 1."""


def load_recorded(path: Path | None = None) -> list[RecordedRun]:
    """Recorded runs.

    Args:
        path: a JSON list; None takes those that come with the package.

    Raises:
        ConfigError: the file is missing or not such a list.
    """
    try:
        packaged = files("cutlayer.privacy").joinpath("recorded_runs.json")
        data = packaged.read_bytes() if path is None else path.read_bytes()
        return msgspec.json.decode(data, type=list[RecordedRun])
    except OSError as error:
        raise ConfigError(f"cannot read recorded runs {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path or 'recorded_runs.json'} is no list of runs: {error}") from error


def comparable_runs(runs: Sequence[RecordedRun], mechanism: str, scale: float) -> list[RecordedRun]:
    """Runs of the same mechanism whose scale is within a factor of two, the nearest first."""

    def distance(run: RecordedRun) -> float:
        assert run.scale is not None
        return max(run.scale / scale, scale / run.scale)

    like = [run for run in runs if run.mechanism == mechanism and run.scale]
    return sorted((run for run in like if distance(run) <= _FACTOR), key=distance)
