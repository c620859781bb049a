"""Settings of a strategy. It does not compute (`strategy`)."""

from pydantic import Field

from cutlayer.settings import Settings

__all__ = ["StrategySettings"]


class StrategySettings(Settings):
    """How updates become the next round's adapters."""

    kind: str = "fedavg"
    """Registered name: see `federation.strategy`."""
    proximal: float = Field(default=0.01, ge=0)
    """fedprox: weight of the squared distance from the round's start."""
    lr: float = Field(default=1e-3, gt=0)
    """fedadam and every_step: learning rate of the server's optimizer."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """fedadam and every_step: decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """fedadam and every_step: decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """every_step: added to the root of the second moment; fedadam: its tau."""
    weight_decay: float = Field(default=0.0, ge=0)
    """every_step: decoupled decay."""
    clip_norm: float | None = Field(default=None, gt=0)
    """every_step: largest global norm of the mean gradient over all parts."""
    trim: float = Field(default=0.2, ge=0, lt=0.5)
    """trimmed_mean: share of members cut off at each end, per value, rounded up."""
