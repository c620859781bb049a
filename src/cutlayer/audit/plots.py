"""Pictures of an audit: recovery by scale, and the front of recovery against utility.

PNG files stand alone; the SVG text has the reading page's own colours. It computes no score.
"""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cutlayer.audit.results import Trial
from cutlayer.figures import figure_style, require_matplotlib
from cutlayer.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Point", "front", "pictures", "points", "require_pictures", "utility_of", "write_png"]

_INK = "#0a0b0c"
"""A colour that no curve has: it becomes the page's text colour."""
_COLOURS = ("#2f7ed8", "#d9722e", "#3a9c63", "#b0529f", "#8a7a1f", "#777777")
_MARKS = "osD^vP"
_NO_DATE = {"Date": None, "Creator": None, "Format": None, "Type": None}
_TARGET = 0.1


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trial in the plane of recovery and utility."""

    number: int
    """Of the trial in the report, from 1."""
    trial: Trial
    recovery: float
    utility: float
    """More is better: choice accuracy, else 1 / perplexity."""


def require_pictures() -> None:
    """Fail before work where no picture can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib("the report's pictures need")


def points(trials: Sequence[Trial]) -> list[Point]:
    """Trials that have both a recovery and a utility."""
    found = []
    for number, trial in enumerate(trials, 1):
        utility, recovery = utility_of(trial), trial.recovery
        if recovery is not None and utility is not None:
            found.append(Point(number=number, trial=trial, recovery=recovery, utility=utility))
    return found


def utility_of(trial: Trial) -> float | None:
    """Choice accuracy, else 1 / perplexity; None where neither was measured."""
    utility = trial.utility
    if utility is None:
        return None
    if utility.accuracy is not None:
        return utility.accuracy
    return None if utility.perplexity is None else 1.0 / utility.perplexity


def front(shown: Sequence[Point]) -> list[Point]:
    """Points that no other beats: less recovery with as much utility, or more for as little."""
    ordered = sorted(shown, key=lambda point: (point.recovery, -point.utility))
    kept: list[Point] = []
    for point in ordered:
        if not kept or point.utility > kept[-1].utility:
            kept.append(point)
    return kept


def pictures(trials: Sequence[Trial]) -> dict[str, str]:
    """SVG texts by name, for a page: `recovery`, and `front` where utility was measured."""
    return {name: _svg(draw) for name, draw in _drawings(trials).items()}


def write_png(trials: Sequence[Trial], folder: Path) -> list[Path]:
    """The same as PNG files on white."""
    paths = []
    for name, draw in _drawings(trials).items():
        data = io.BytesIO()
        with _style("#1d2127"):
            draw().savefig(data, format="png", dpi=150, facecolor="white", bbox_inches="tight")
        paths.append(folder / f"{name}.png")
        write_atomic(paths[-1], data.getvalue())
    return paths


def _drawings(trials: Sequence[Trial]) -> dict[str, Callable[[], "Figure"]]:
    found: dict[str, Callable[[], Figure]] = {}
    if any(trial.recovery is not None for trial in trials):
        found["recovery"] = lambda: _recovery(trials)
    if points(trials):
        found["front"] = lambda: _front(trials)
    return found


def _svg(draw: Callable[[], "Figure"]) -> str:
    data = io.BytesIO()
    with _style(_INK):
        draw().savefig(data, format="svg", transparent=True, bbox_inches="tight", metadata=_NO_DATE)
    text = data.getvalue().decode()
    # The file's head, its metadata and its size are for a file that stands alone.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    return text.replace(_INK, "currentColor")


def _style(ink: str) -> AbstractContextManager[None]:
    return figure_style(ink, 0.15)


def _recovery(trials: Sequence[Trial]) -> "Figure":
    """One line a rule, one mark a cut: recovery of the strongest attack with its interval."""
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(_rule_name(trial) for trial in trials))
    cuts = _cuts(trials)
    figure = Figure(figsize=(8.2, 1.3 + 0.42 * len(rules)))
    axes = figure.subplots()
    for trial in trials:
        worst = trial.worst
        if worst is None or worst.recovery is None:
            continue
        place = cuts.index(_cut_name(trial))
        row = rules.index(_rule_name(trial)) + 0.18 * (place - (len(cuts) - 1) / 2)
        share, colour = worst.recovery, _COLOURS[place % len(_COLOURS)]
        axes.hlines(row, 100 * share.low, 100 * share.high, color=colour, linewidth=2)
        mark = _MARKS[place % len(_MARKS)]
        axes.plot(100 * share.value, row, mark, color=colour, markersize=6)
        if trial.prior is not None:
            axes.plot(100 * trial.prior, row, "|", color="#888888", markersize=10)
    axes.set_yticks(range(len(rules)), rules)
    axes.set_ylim(len(rules) - 0.5, -0.5)
    _name_cuts(axes, cuts)
    _percent_axis(axes)
    return figure


def _front(trials: Sequence[Trial]) -> "Figure":
    """Recovery against utility; the line joins what no other setting beats."""
    from matplotlib.figure import Figure

    shown, cuts = points(trials), _cuts(trials)
    figure = Figure(figsize=(8.2, 4.2))
    axes = figure.subplots()
    best = front(shown)
    axes.step(
        [100 * point.recovery for point in best],
        [point.utility for point in best],
        where="post",
        color="#888888",
        linestyle="--",
        linewidth=1,
    )
    for point in shown:
        place = cuts.index(_cut_name(point.trial))
        x, mark = 100 * point.recovery, _MARKS[place % len(_MARKS)]
        colour, fill = _COLOURS[place % len(_COLOURS)], _fill(point.trial)
        axes.plot(x, point.utility, mark, fillstyle=fill, color=colour, markersize=7)
        axes.annotate(
            str(point.number),
            (x, point.utility),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.axvspan(0, 100 * _TARGET, color="#3a9c63", alpha=0.12, linewidth=0)
    is_accuracy = any(p.trial.utility and p.trial.utility.accuracy is not None for p in shown)
    axes.set_ylabel("task score" if is_accuracy else "1 / perplexity")
    _name_cuts(axes, cuts)
    _percent_axis(axes)
    return figure


def _percent_axis(axes: "Axes") -> None:
    axes.set_xlim(-2, 102)
    axes.set_xlabel("private tokens recovered by the strongest attack, %")
    axes.grid(True)


def _name_cuts(axes: "Axes", cuts: Sequence[str]) -> None:
    for place, cut in enumerate(cuts):
        colour, mark = _COLOURS[place % len(_COLOURS)], _MARKS[place % len(_MARKS)]
        axes.plot([], [], linestyle="", label=cut, color=colour, marker=mark)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, handletextpad=0.2)


def _fill(trial: Trial) -> Literal["full", "none"]:
    """Full marks are trained settings."""
    return "full" if trial.spec.phase == "trained" else "none"


def _cuts(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(_cut_name(trial) for trial in trials))


def _cut_name(trial: Trial) -> str:
    return f"cut {trial.spec.lower}:{trial.spec.upper}"


def _rule_name(trial: Trial) -> str:
    withheld = "" if trial.spec.withhold == "none" else f" + withhold {trial.spec.withhold}"
    phase = " (trained)" if trial.spec.phase == "trained" else ""
    return f"{trial.spec.rule.label}{withheld}{phase}"
