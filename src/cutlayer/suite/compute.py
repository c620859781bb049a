"""What a run computes on; nothing of it changes a score but by rounding. It runs nothing."""

from dataclasses import dataclass

__all__ = ["Compute"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Of each side of a run, and of the unsplit script."""

    threads: int = 2
    """Of torch."""
    device: str = "cpu"
    """torch device, as `model.device` of a client."""
