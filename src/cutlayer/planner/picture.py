"""A plan as one picture: what each cut costs the client, and what an attacker gets of it.

It predicts nothing and chooses no cut (`front`): marks and labels come with the points.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.errors import ConfigError
from cutlayer.figures import figure_style, require_matplotlib
from cutlayer.model.partition import Cut
from cutlayer.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

__all__ = ["Point", "require_pictures", "write_picture"]

_GB = 1e9
_INK, _GREY, _LINE = "#1d2127", "#8b929b", "#2f7ed8"
_NEEDS = "the picture needs"
_GRID = {"axes.grid": True, "axes.axisbelow": True}
_NEAR = 1.2
"""A limit is drawn up to so many times the greatest memory."""
_LEAK_COLOURS = "plasma_r"
_PLACES = tuple(
    (side * width, rise)
    for width, rises in ((10, (9, -15)), (16, (26, -32)), (26, (46, -52, 0)), (60, (70, -76, 20)))
    for rise in rises
    for side in (1, -1)
)
"""Where a label may stand, in points from its mark, the best first."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One cut of a plan."""

    cut: Cut
    memory_bytes: float
    """Predicted at the client."""
    seconds: float
    """Predicted, per 1,000 tokens."""
    leak: float | None = None
    """Share of private tokens that the strongest attack recovered, 0 to 1; None: not audited."""
    is_leak_exact: bool = True
    """Whether exactly this cut was audited, or a neighbour."""
    is_front: bool = False
    """Whether no other cut is better in everything."""
    is_feasible: bool = True
    """Whether it fits the client."""
    labels: tuple[str, ...] = ()
    """Goals for which it is recommended."""


def require_pictures() -> None:
    """Fail before work where no plan can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib(_NEEDS)


def write_picture(
    points: Sequence[Point],
    path: Path,
    title: str,
    memory_limit_bytes: float | None = None,
    what: str = "training",
) -> None:
    """Draw the plan as PNG or SVG, whole or not at all.

    Args:
        points: at least one.
        path: the file; its suffix is .png or .svg, its folder exists.
        title: model and workload in few words; nothing private.
        memory_limit_bytes: what the client has, as a border or, far off, in words; None is unknown.
        what: whose seconds they are.

    Raises:
        ConfigError: no point, another suffix, or matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ConfigError(f"the picture {path} must end with .png or .svg")
    if not points:
        raise ConfigError("there is no cut to draw")
    require_pictures()
    data = io.BytesIO()
    with figure_style(_INK, 0.12, _GRID):
        figure = _figure(points, title, memory_limit_bytes, what)
        # No date: the same plan gives the same file.
        plain = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(data, format=kind, dpi=150, facecolor="white", metadata=plain)
    write_atomic(path, data.getvalue())


def _figure(
    points: Sequence[Point], title: str, memory_limit_bytes: float | None, what: str
) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.margins(0.12, 0.16)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("client memory, GB")
    axes.set_ylabel(f"seconds per 1,000 tokens, {what}")
    _draw_marks(figure, axes, points)
    if memory_limit_bytes is not None:
        _draw_limit(axes, points, memory_limit_bytes)
    _draw_legend(figure, axes, points)
    _draw_labels(figure, axes, points)
    return figure


def _draw_marks(figure: "Figure", axes: "Axes", points: Sequence[Point]) -> None:
    for point in points:
        if not point.is_feasible:
            axes.plot(*_place(point), ".", color=_GREY, markersize=4, alpha=0.5, zorder=1)
            continue
        axes.plot(
            *_place(point),
            _mark(point),
            markersize=_size(point),
            markerfacecolor="white",
            markeredgecolor=_LINE if point.is_front else _GREY,
            markeredgewidth=2.0 if point.is_front else 0.8,
            zorder=3 if point.is_front else 2,
        )
    _draw_leaks(figure, axes, [point for point in points if point.is_feasible])


def _draw_limit(axes: "Axes", points: Sequence[Point], limit_bytes: float) -> None:
    """A border, where it is not so far away that the marks would shrink to a line."""
    if limit_bytes > _NEAR * max(point.memory_bytes for point in points):
        axes.set_xlabel(f"client memory, GB; the client has {limit_bytes / _GB:.1f}")
        return
    axes.axvline(limit_bytes / _GB, color=_INK, linestyle=":", linewidth=1.2)
    axes.plot([], [], ":", color=_INK, linewidth=1.2, label="client's memory")


def _draw_leaks(figure: "Figure", axes: "Axes", points: Sequence[Point]) -> None:
    """Fill the marks of what was audited."""
    known = [point for point in points if point.leak is not None]
    scale = None
    for is_exact in (True, False):
        some = [point for point in known if point.is_leak_exact is is_exact]
        if some:
            scale = axes.scatter(
                [_place(point)[0] for point in some],
                [_place(point)[1] for point in some],
                c=[100 * (point.leak or 0.0) for point in some],
                s=40 if is_exact else 28,
                marker=_mark(some[0]),
                cmap=_LEAK_COLOURS,
                vmin=0,
                vmax=100,
                linewidths=0,
                zorder=4,
            )
    if scale is not None:
        bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=30)
        bar.set_label("private tokens recovered by the strongest attack, %")
        bar.outline.set_visible(False)


def _mark(point: Point) -> str:
    return "D" if _is_of_neighbour(point) else "o"


def _is_of_neighbour(point: Point) -> bool:
    return point.leak is not None and not point.is_leak_exact


def _size(point: Point) -> float:
    if not point.is_front and point.leak is None:
        return 4.5
    return 6.5 if _is_of_neighbour(point) else 8


def _place(point: Point) -> tuple[float, float]:
    return point.memory_bytes / _GB, point.seconds


def _draw_legend(figure: "Figure", axes: "Axes", points: Sequence[Point]) -> None:
    fits = [point for point in points if point.is_feasible]
    kinds = (
        (any(p.is_front for p in fits), "o", "no other cut beats it", _LINE, 8, 2.0),
        (any(p.leak is None for p in fits), "o", "leak not measured", _GREY, 4.5, 0.8),
        (any(map(_is_of_neighbour, fits)), "D", "leak of a neighbour", _GREY, 6.5, 0.8),
        (len(fits) < len(points), ".", "not feasible", _GREY, 4, 0.8),
    )
    for is_there, form, text, colour, size, edge in kinds:
        if is_there:
            (line,) = axes.plot([], [], form, color=colour, label=text)
            line.set(markerfacecolor="white", markersize=size, markeredgewidth=edge)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=5, fontsize=9, handletextpad=0.3)


def _draw_labels(figure: "Figure", axes: "Axes", points: Sequence[Point]) -> None:
    """Name the recommended cuts, each where it hides least."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # Constrained layout has settled; what moves now would move away from its label.
    figure.set_layout_engine("none")
    taken = [_around(axes, point) for point in points]
    for point in points:
        if point.labels:
            taken.append(_labelled(canvas, axes, point, taken))


def _labelled(
    canvas: "FigureCanvasAgg", axes: "Axes", point: Point, taken: Sequence["Bbox"]
) -> "Bbox":
    from matplotlib.text import Text

    text = f"{point.cut.lower}:{point.cut.upper}  {', '.join(point.labels)}"
    best: tuple[float, Annotation, Bbox] | None = None
    for place in _PLACES:
        label = _annotation(axes, point, text, place)
        # The text alone: with its line it would always reach its own mark.
        label.update_positions(canvas.get_renderer())
        box = Text.get_window_extent(label, canvas.get_renderer())
        hidden = _hidden(box, taken) + _outside(box, canvas)
        if best is None or hidden < best[0]:
            if best is not None:
                best[1].remove()
            best = (hidden, label, box)
        else:
            label.remove()
    assert best is not None
    return best[2]


def _annotation(axes: "Axes", point: Point, text: str, place: tuple[int, int]) -> "Annotation":
    return axes.annotate(
        text,
        _place(point),
        xytext=place,
        textcoords="offset points",
        ha="left" if place[0] > 0 else "right",
        fontsize=9.5,
        fontweight="bold",
        zorder=5,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0},
        arrowprops={"arrowstyle": "-", "color": _GREY, "linewidth": 0.8, "shrinkB": 5},
    )


def _around(axes: "Axes", point: Point) -> "Bbox":
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(_place(point))
    return Bbox.from_extents(x - 6, y - 6, x + 6, y + 6)


def _hidden(box: "Bbox", taken: Sequence["Bbox"]) -> float:
    return float(sum(_area(box, other) for other in taken))


def _area(one: "Bbox", other: "Bbox") -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, float(width)) * max(0.0, float(height))


def _outside(box: "Bbox", canvas: "FigureCanvasAgg") -> float:
    """Area beyond the picture's border, which counts most."""
    from matplotlib.transforms import Bbox

    width, height = canvas.get_width_height()
    whole = Bbox.from_extents(0, 0, width, height)
    return 10 * (float(box.width * box.height) - _area(box, whole))
