"""What a simulated federation came to: scores and costs of every owner, as values and as a table.

It measures nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cutlayer.errors import ProtocolError
from cutlayer.simulation.heldout import HeldOut

__all__ = ["OwnerResult", "SimulationResult", "Training", "training_of"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One owner's training, as its process or thread told it."""

    loss_first: float | None
    """Mean over the first step's scored tokens."""
    loss_last: float | None
    """Mean over the last step's scored tokens."""
    num_tokens: int
    seconds: float
    """Waiting for the other owners included."""
    bytes_up: int
    bytes_down: int
    guarantee: str
    """What the noise promises."""

    def values(self) -> dict[str, object]:
        """Plain values."""
        return {
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
            "tokens": self.num_tokens,
            "seconds": round(self.seconds, 2),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }


@dataclass(frozen=True, kw_only=True)
class OwnerResult:
    """One owner: scores on its own held-out rows."""

    name: str
    num_rows: int
    """It trained on."""
    before: HeldOut
    """The model as it came."""
    alone: HeldOut | None
    """Trained by itself; None where that was not asked for."""
    together: HeldOut
    """Trained in the federation."""
    trained_alone: Training | None
    trained_together: Training

    def values(self) -> dict[str, object]:
        """Plain values."""
        scores = {"before": self.before, "alone": self.alone, "together": self.together}
        values: dict[str, object] = {"name": self.name, "rows": self.num_rows}
        values["heldout_rows"] = self.together.num_rows
        for kind, score in scores.items():
            values[f"accuracy_{kind}"] = None if score is None else score.accuracy
            values[f"loss_{kind}"] = None if score is None else round(score.loss, 5)
        values["alone"] = None if self.trained_alone is None else self.trained_alone.values()
        values["together"] = self.trained_together.values()
        values["guarantee"] = self.trained_together.guarantee
        return values

    def cells(self) -> tuple[str, ...]:
        """One line of the table."""
        alone = "-" if self.alone is None else f"{self.alone.accuracy:.3f}"
        before, together = f"{self.before.accuracy:.3f}", f"{self.together.accuracy:.3f}"
        return (self.name, str(self.num_rows), before, alone, together)


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """The whole federation."""

    rounds: int
    steps: int
    """Optimizer steps of each owner, together and alone."""
    strategy: str
    updates: str
    """Who sees an owner's update."""
    is_in_processes: bool
    seed: int
    owners: list[OwnerResult]
    seconds_by_phase: dict[str, float]

    COLUMNS = ("owner", "rows", "before", "alone", "together")

    @property
    def seconds(self) -> float:
        """From reading the settings to the last score."""
        return sum(self.seconds_by_phase.values())

    def values(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return {
            "rounds": self.rounds,
            "clients": len(self.owners),
            "accuracy_before": {o.name: o.before.accuracy for o in self.owners},
            "accuracy_alone": {o.name: o.alone and o.alone.accuracy for o in self.owners},
            "accuracy_together": {o.name: o.together.accuracy for o in self.owners},
            "steps": self.steps,
            "strategy": self.strategy,
            "updates": self.updates,
            "processes": self.is_in_processes,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "seconds_by_phase": {k: round(v, 2) for k, v in self.seconds_by_phase.items()},
            "owners": [owner.values() for owner in self.owners],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Lines of the table under `COLUMNS`."""
        return [owner.cells() for owner in self.owners]


def training_of(result: Mapping[str, object]) -> Training:
    """The result of `cutlayer train --json`.

    Raises:
        ProtocolError: it lacks a number.
    """
    return Training(
        loss_first=_number(result, "loss_first") if result.get("loss_first") is not None else None,
        loss_last=_number(result, "loss_last") if result.get("loss_last") is not None else None,
        num_tokens=int(_number(result, "num_tokens")),
        seconds=_number(result, "seconds"),
        bytes_up=int(_number(result, "bytes_up")),
        bytes_down=int(_number(result, "bytes_down")),
        guarantee=str(result.get("guarantee")),
    )


def _number(result: Mapping[str, object], key: str) -> float:
    value = result.get(key)
    if not isinstance(value, int | float):
        raise ProtocolError(f"cutlayer train --json gave {key}={value!r}, a number is needed")
    return float(value)
