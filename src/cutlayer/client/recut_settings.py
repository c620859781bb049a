"""Settings of a re-cut: what may become visible, and when one is wanted. It does nothing."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from cutlayer.settings import Settings

__all__ = ["BatteryPolicy", "LinkPolicy", "MemoryPolicy", "RecutSettings"]


def _checked(pair: tuple[int, int]) -> tuple[int, int]:
    try:
        Cut(*pair)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return pair


CutPair = Annotated[tuple[int, int], AfterValidator(_checked)]
"""A cut as settings write it: [lower, upper]."""


class BatteryPolicy(Settings):
    """What a low battery leads to, while the machine is not charging."""

    below_percent: float = Field(gt=0, lt=100)
    """Charge, in percent, below which the run goes to `cut`."""
    cut: CutPair
    """Where to, as [lower, upper]."""


class MemoryPolicy(Settings):
    """What little available memory leads to."""

    below_gb: float = Field(gt=0)
    """Memory that programs may still take, in GB of 1e9 bytes, below which the run goes to `cut`:
    the machine's, or what is left of the control group's limit."""
    cut: CutPair
    """Where to, as [lower, upper]."""


class LinkPolicy(Settings):
    """What a slow link leads to."""

    below_mbit_s: float | None = Field(default=None, gt=0)
    """Rate of the calls of the last steps, in Mbit/s, below which the run goes to `cut`."""
    above_rtt_ms: float | None = Field(default=None, gt=0)
    """Fastest of the last calls, in ms, above which it does so."""
    cut: CutPair
    """Where to, as [lower, upper]."""

    @model_validator(mode="after")
    def _has_a_threshold(self) -> Self:
        if self.below_mbit_s is None and self.above_rtt_ms is None:
            raise ValueError("set below_mbit_s, above_rtt_ms or both")
        return self


class RecutSettings(Settings):
    """Moving the cut of a run that goes on; docs/recut.md."""

    share_adapter: bool = False
    """Accept that blocks move to the server with their trained adapter and its moments."""
    return_cut: tuple[int, int] | None = None
    """Where a policy that went away goes when all is well again; None stays where it is."""
    look_every_s: float = Field(default=10.0, gt=0)
    """Seconds between two looks at battery, memory and link; it looks between steps only."""
    cool_down_s: float = Field(default=300.0, ge=0)
    """Seconds after a re-cut in which no policy wants another."""
    margin: float = Field(default=0.2, ge=0, le=10)
    """How far beyond its threshold a reading must be to count as well again: 0.2 is 20 percent."""
    battery: BatteryPolicy | None = None
    """Re-cut when the battery runs low; absent does not look at it."""
    memory: MemoryPolicy | None = None
    """Re-cut when memory runs short; absent does not look at it."""
    link: LinkPolicy | None = None
    """Re-cut when the link gets slow; absent does not look at it."""

    @field_validator("return_cut")
    @classmethod
    def _is_a_cut(cls, pair: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if pair is None else _checked(pair)

    @property
    def has_policy(self) -> bool:
        """Whether anything but a command can want a re-cut."""
        return any((self.battery, self.memory, self.link))

    @model_validator(mode="after")
    def _returns_from_somewhere(self) -> Self:
        if self.return_cut is not None and not self.has_policy:
            raise ValueError(
                "return_cut is read by policies alone; add [recut.battery], [recut.memory] or "
                "[recut.link]"
            )
        return self
