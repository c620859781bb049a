"""What a strategy offers, and the registry of them. It holds no strategy (`strategy`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.federation.aggregation import Update
from cutlayer.federation.strategy_settings import StrategySettings
from cutlayer.federation.trunk_pool import UpdateKind
from cutlayer.model.adapters import AdapterState

__all__ = ["STRATEGIES", "Strategies", "Strategy"]


class Strategy(Protocol):
    """One federation's rule; it may keep moments from round to round."""

    sends: ClassVar[UpdateKind]
    """What members contribute."""
    needs_single_updates: ClassVar[bool]
    """The mean alone is not enough; so secure aggregation must be off."""
    freezes_a: ClassVar[bool]
    """LoRA's A stays as it was drawn; members train and send B alone."""
    needs_lora: ClassVar[bool]
    """The rule is about LoRA's two factors, so no other kind of adapter can be trained by it."""
    proximal_weight: float
    """Members add half of this times the squared distance from the round's start to their loss."""

    def __init__(self, settings: StrategySettings) -> None:
        """Make it from its settings."""

    def aggregate(self, current: AdapterState, updates: Sequence[Update]) -> AdapterState:
        """The next adapters where single updates are visible.

        Args:
            current: the adapters at the round's start.
            updates: of any order; a member may have several with different keys.
        """

    def apply(self, current: AdapterState, mean: AdapterState) -> AdapterState:
        """The next adapters where only the weighted mean is known; keys that it lacks stay.

        Raises:
            ConfigError: this rule needs single updates.
        """

    def state(self) -> dict[str, Tensor]:
        """The server optimizer's moments; empty where there is none."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state()` gave."""


class Strategies:
    """Names to strategy classes; the error for an unknown name lists the known ones."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Strategy]] = {}

    def register(self, name: str) -> Callable[[type[Strategy]], type[Strategy]]:
        """Class decorator: the class becomes known under `name`."""

        def add(cls: type[Strategy]) -> type[Strategy]:
            assert name not in self._classes, f"strategy {name!r} is registered twice"
            self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[Strategy]:
        """The class called `name`.

        Raises:
            ConfigError: nothing has that name.
        """
        if name not in self._classes:
            raise ConfigError(f"no strategy is called {name!r}; known: {', '.join(self)}")
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __contains__(self, name: object) -> bool:
        return name in self._classes


STRATEGIES = Strategies()
