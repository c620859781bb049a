"""Utilities that were measured, with noise and without, to compare a plan with.

It computes no utility and fits no curve: where nothing like the plan was run, it says nothing.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError

__all__ = ["RecordedRun", "comparable_runs", "load_recorded", "runs_without_noise"]

_NO_NOISE = "none"
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
    """The same with nothing withheld either."""
    recovery: float | None = None
    """Share of private tokens that the best attack recovered, 0 to 1."""
    model: str = ""
    """That was trained."""
    rows: int | None = None
    """It was trained on."""
    steps: int | None = None
    """Of training."""
    epsilon: str | None = None
    """What the rule promised, with its unit; None where it promised nothing."""


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


def runs_without_noise(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """Runs without noise, the best score first: noise on top of them can only cost."""
    plain = [run for run in runs if run.mechanism == _NO_NOISE]
    return sorted(plain, key=lambda run: -run.score)


def comparable_runs(runs: Sequence[RecordedRun], mechanism: str, scale: float) -> list[RecordedRun]:
    """Runs of the same mechanism whose scale is within a factor of two, the nearest first."""

    def distance(run: RecordedRun) -> float:
        assert run.scale is not None
        return max(run.scale / scale, scale / run.scale)

    like = [run for run in runs if run.mechanism == mechanism and run.scale]
    return sorted((run for run in like if distance(run) <= _FACTOR), key=distance)
