"""Pictures of results with error bars, as SVG files on white. They judge nothing.

The same results give the same bytes, with one version of matplotlib.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.errors import ConfigError
from cutlayer.figures import figure_style, require_matplotlib
from cutlayer.storage.files import write_atomic
from cutlayer.suite.arms import Arm, Sheet
from cutlayer.suite.compare import score
from cutlayer.suite.spec import Method
from cutlayer.suite.tables import cut_arms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DEMO_SCALE", "draw_cuts", "draw_scores", "require_pictures", "write_picture"]

DEMO_SCALE = "demo-scale, not comparable with published tables"
"""Stands over everything measured on packaged rows."""

_INK, _GREY = "#1d2127", "#8b929b"
_COLOURS = {
    Method.UNTUNED: "#8b929b",
    Method.CENTRALISED: "#1d2127",
    Method.SPLIT: "#2f7ed8",
    Method.TOGETHER: "#d9722e",
}
_NEEDS = "the report's pictures need"
_NO_DATE = {"Date": None, "Creator": None, "Format": None, "Type": None}
_MODE = 0o644
_GRID = {"axes.axisbelow": True}


def require_pictures() -> None:
    """Fail before work where no picture can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib(_NEEDS)


def write_picture(path: Path, draw: Callable[[], "Figure"]) -> None:
    """Write a picture as SVG or PNG, whole or not at all.

    Args:
        path: of the picture; its ending says which.
        draw: makes the figure, in our style.

    Raises:
        ConfigError: another ending, or matplotlib is not installed.
        StorageError: it cannot be written.
    """
    require_pictures()
    kind = path.suffix.removeprefix(".")
    if kind not in ("svg", "png"):
        raise ConfigError(f"{path}: a picture's name ends in .svg or .png")
    data = io.BytesIO()
    with figure_style(_INK, 0.15, _GRID):
        # White, not transparent: a page may be read on a dark ground.
        draw().savefig(
            data,
            format=kind,
            dpi=120,
            facecolor="white",
            bbox_inches="tight",
            metadata=_NO_DATE if kind == "svg" else {"Software": None},
        )
    write_atomic(path, data.getvalue(), _MODE)


def draw_scores(sheet: Sheet, metric: str) -> "Figure":
    """All methods of a task: one dot each with its 95 % interval, centralised as a band.

    Raises:
        DataError: a run lacks the metric.
    """
    from matplotlib.figure import Figure

    arms = sheet.scored
    figure = Figure(figsize=(7.4, 1.5 + 0.3 * len(arms)))
    axes = figure.subplots()
    _untuned_line(axes, sheet, metric)
    _centralised_band(axes, sheet, metric)
    for row, arm in enumerate(arms):
        _dot(axes, row, arm, metric, _COLOURS[arm.spec.method])
    axes.set_yticks(range(len(arms)), [f"{arm.name}{_seeds(arm)}" for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{metric}, points of 100, with 95 % interval")
    axes.grid(True, axis="x")
    axes.set_title(_title(sheet), fontsize=10, loc="left")
    return figure


def draw_cuts(sheet: Sheet, metric: str, recoveries: dict[tuple[int, int], float]) -> "Figure":
    """By p and q: score with its interval, the owner's memory, and recovery where audited.

    Args:
        recoveries: share of tokens recovered, by p and q.

    Raises:
        DataError: a run lacks the metric.
    """
    from matplotlib.figure import Figure

    arms = cut_arms(sheet)
    columns: list[tuple[str, Callable[[Axes], None]]] = [
        (f"{metric}, points of 100", lambda axes: _score_column(axes, arms, sheet, metric))
    ]
    memory = [_mean(run.peak_client_bytes for run in arm.results) for arm in arms]
    if any(memory):
        megabytes = [None if value is None else value / 1e6 for value in memory]
        columns.append(("client memory, MB", lambda axes: _bars(axes, megabytes, "#3a9c63")))
    recovered = [recoveries.get((a.spec.head_blocks, a.spec.tail_blocks)) for a in arms]
    if any(value is not None for value in recovered):
        percent = [None if value is None else 100 * value for value in recovered]
        columns.append(("tokens recovered, %", lambda axes: _bars(axes, percent, "#b0529f")))
    figure = Figure(figsize=(3.2 + 2.4 * len(columns), 1.5 + 0.32 * len(arms)))
    row = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (title, draw) in zip(row, columns, strict=True):
        draw(axes)
        axes.set_xlabel(title)
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)
    names = [f"p={arm.spec.head_blocks} q={arm.spec.tail_blocks}" for arm in arms]
    row[0].set_yticks(range(len(arms)), names)
    row[0].set_ylim(len(arms) - 0.4, -0.6)
    row[0].set_title(_title(sheet), fontsize=10, loc="left")
    return figure


def _score_column(axes: "Axes", arms: Sequence[Arm], sheet: Sheet, metric: str) -> None:
    _centralised_band(axes, sheet, metric)
    for row, arm in enumerate(arms):
        _dot(axes, row, arm, metric, _COLOURS[arm.spec.method])


def _untuned_line(axes: "Axes", sheet: Sheet, metric: str) -> None:
    untuned = sheet.untuned
    if untuned is not None:
        mean = 100 * score(untuned, metric).mean
        axes.axvline(mean, color=_GREY, linestyle=":", linewidth=1.2, zorder=1)


def _centralised_band(axes: "Axes", sheet: Sheet, metric: str) -> None:
    """Its mean as a line, with its interval behind it."""
    central = sheet.centralised()
    if central is not None:
        summary = score(central, metric)
        low, high = 100 * summary.low, 100 * summary.high
        axes.axvspan(low, high, color=_INK, alpha=0.07, linewidth=0, zorder=0)
        axes.axvline(100 * summary.mean, color=_INK, linestyle="--", linewidth=1, zorder=1)


def _dot(axes: "Axes", row: int, arm: Arm, metric: str, colour: str) -> None:
    summary = score(arm, metric)
    axes.hlines(row, 100 * summary.low, 100 * summary.high, color=colour, linewidth=2, zorder=2)
    axes.plot(100 * summary.mean, row, "o", color=colour, markersize=6, zorder=3)


def _bars(axes: "Axes", values: Sequence[float | None], colour: str) -> None:
    for row, value in enumerate(values):
        if value is not None:
            axes.barh(row, value, height=0.55, color=colour)
            axes.annotate(
                f" {value:,.0f}", (value, row), va="center", fontsize=8, annotation_clip=False
            )
    # Room for the numbers.
    axes.set_xlim(0, 1.22 * max((value for value in values if value), default=1.0))


def _mean(values: Iterable[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _seeds(arm: Arm) -> str:
    return "" if len(arm.results) == 1 else f" ({len(arm.results)} seeds)"


def _title(sheet: Sheet) -> str:
    scale = f": {DEMO_SCALE}" if sheet.source == "packaged" else ""
    return sheet.task + scale
