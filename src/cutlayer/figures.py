"""How our pictures look, and whether they can be drawn at all. It draws none."""

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager

from cutlayer.errors import ConfigError

__all__ = ["figure_style", "require_matplotlib"]


def require_matplotlib(what: str) -> None:
    """Fail before work where no picture can be drawn.

    Args:
        what: needs it; the message begins with it, such as "the picture needs".

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError(
            f"{what} the package matplotlib, which is not installed: pip install 'cutlayer[audit]'"
        ) from error


def figure_style(
    ink: str, grid_alpha: float, more: Mapping[str, bool] | None = None
) -> AbstractContextManager[None]:
    """Inside, figures have our fonts, one colour for text and lines, and no frame.

    Args:
        ink: that colour.
        grid_alpha: strength of grid lines, 0 to 1.
        more: further settings of matplotlib, by name.
    """
    import matplotlib

    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plain = {
        "svg.fonttype": "none",
        "svg.hashsalt": "cutlayer",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": ink,
        "grid.alpha": grid_alpha,
        "legend.frameon": False,
    }
    style: AbstractContextManager[None] = matplotlib.rc_context(
        {**dict.fromkeys(inks, ink), **plain, **(more or {})}
    )
    return style
