"""The name under which the commands know `simulation.settings_text`."""

from cutlayer.simulation.settings_text import settings_text

__all__ = ["settings_text"]
