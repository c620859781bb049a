"""One data set among several owners: how a simulated federation comes to its private rows.

It looks at one text per row (its label or domain) and gives row numbers; it reads no file.
Every row goes to exactly one owner, and the same seed gives the same owners everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy
from pydantic import Field

from cutlayer.data.batches import shuffled
from cutlayer.errors import ConfigError, DataError
from cutlayer.settings import Settings

__all__ = ["PARTITIONS", "PartitionRegistry", "PartitionRule", "PartitionSettings", "partition"]


class PartitionSettings(Settings):
    """How rows are shared out."""

    kind: str = "iid"
    """iid, dirichlet or natural."""
    alpha: float = Field(default=0.5, gt=0)
    """dirichlet: small values give each owner few labels, large ones are like iid."""
    column: str | None = None
    """dirichlet: column with the label; natural: column that names the owner."""
    min_rows: int = Field(default=2, ge=1)
    """An owner with fewer rows is an error."""


class PartitionRule(Protocol):
    """A way to share rows out."""

    def __call__(
        self, keys: Sequence[str], num_owners: int, settings: PartitionSettings, seed: int
    ) -> list[list[int]]:
        """Row numbers of each owner, each row once."""


P = TypeVar("P", bound=PartitionRule)


class PartitionRegistry:
    """Ways to share rows out, by name."""

    def __init__(self) -> None:
        self._rules: dict[str, PartitionRule] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names, sorted."""
        return tuple(sorted(self._rules))

    def register(self, name: str) -> Callable[[P], P]:
        """Function decorator."""

        def add(rule: P) -> P:
            assert name not in self._rules, f"partition {name} is registered twice"
            self._rules[name] = rule
            return rule

        return add

    def get(self, name: str) -> PartitionRule:
        """The rule of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._rules:
            raise ConfigError(f"partition {name!r} is unknown; known: {', '.join(self.names)}")
        return self._rules[name]


PARTITIONS = PartitionRegistry()

_ORDER, _MIXES = 20, 21
"""Random streams, apart from those of epochs and splits."""


def partition(
    keys: Sequence[str], num_owners: int, settings: PartitionSettings, seed: int
) -> list[list[int]]:
    """Row numbers of each owner, ascending; every row once.

    Args:
        keys: one per row: its label (dirichlet), its owner (natural); iid does not look at it.
        num_owners: how many.
        settings: the rule.
        seed: of all choices.

    Raises:
        ConfigError: unknown rule, or owners that the rows cannot have.
        DataError: an owner gets too few rows.
    """
    rule = PARTITIONS.get(settings.kind)
    if num_owners < 1:
        raise ConfigError(f"{num_owners} owners; a federation needs at least one")
    parts = [sorted(rows) for rows in rule(keys, num_owners, settings, seed)]
    for place, rows in enumerate(parts):
        if len(rows) < settings.min_rows:
            raise DataError(
                f"owner {place + 1} of {num_owners} gets {len(rows)} of {len(keys)} rows, "
                f"{settings.min_rows} are wanted; have fewer owners or more rows"
            )
    return parts


@PARTITIONS.register("iid")
def _iid(
    keys: Sequence[str], num_owners: int, settings: PartitionSettings, seed: int
) -> list[list[int]]:
    """Dealt out like cards: all owners alike, their sizes at most one row apart."""
    order = shuffled(len(keys), seed, _ORDER)
    return [list(order[place::num_owners]) for place in range(num_owners)]


@PARTITIONS.register("dirichlet")
def _dirichlet(
    keys: Sequence[str], num_owners: int, settings: PartitionSettings, seed: int
) -> list[list[int]]:
    """Owners of one size, each with its own mix of labels: q ~ Dir(alpha p), p all labels' shares.

    Rows are drawn one by one by the owner's mix, without replacement; a label that has run out
    is left out of the mix. Owners draw in turns, so that no owner gets the leavings.

    Source: Hsu, Qi and Brown, arXiv:1909.06335, section 3.1.
    """
    pools = _pools(keys, seed)
    shares_L = numpy.array([len(rows) for rows in pools], dtype=float) / max(1, len(keys))
    generator = numpy.random.Generator(numpy.random.Philox(key=[seed, _MIXES]))
    mixes_OL = generator.dirichlet(settings.alpha * shares_L, size=num_owners)
    parts: list[list[int]] = [[] for _ in range(num_owners)]
    for turn in range(len(keys)):
        owner = turn % num_owners
        label = _draw(mixes_OL[owner], [len(rows) for rows in pools], generator.random())
        parts[owner].append(pools[label].pop())
    return parts


@PARTITIONS.register("natural")
def _natural(
    keys: Sequence[str], num_owners: int, settings: PartitionSettings, seed: int
) -> list[list[int]]:
    """Whose row it is stands in the row: one owner per different key, in the keys' order."""
    names = sorted(set(keys))
    if len(names) != num_owners:
        raise ConfigError(
            f"{num_owners} owners, but column {settings.column} has {len(names)} different "
            "values; natural owners are as many as its values"
        )
    return [[row for row, key in enumerate(keys) if key == name] for name in names]


def _pools(keys: Sequence[str], seed: int) -> list[list[int]]:
    """Shuffled row numbers of each label, labels in their own order."""
    order = shuffled(len(keys), seed, _ORDER)
    return [[row for row in order if keys[row] == label] for label in sorted(set(keys))]


def _draw(mix_L: numpy.ndarray, counts: Sequence[int], uniform: float) -> int:
    """A label that still has rows, by the mix; by what is left where the mix is used up."""
    left_L = numpy.array(counts, dtype=float)
    weights_L = numpy.where(left_L > 0, mix_L, 0.0)
    if weights_L.sum() <= 0:
        weights_L = left_L
    ends_L = numpy.cumsum(weights_L)
    label = int(numpy.searchsorted(ends_L, uniform * ends_L[-1], side="right"))
    # Rounding may place the draw at the very end, behind the last label that has rows.
    return min(label, int(numpy.flatnonzero(weights_L)[-1]))
