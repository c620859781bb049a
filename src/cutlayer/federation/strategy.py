"""How members' updates become the next round's adapters: a registered class per rule.

It does not ask members, keep secrets or store (`coordinator`, `secure`, `store`). The rules are in
`mean_strategies` and `robust_strategies`; each docstring says what it equals and what it does not.
"""

from cutlayer.federation.aggregation import Update
from cutlayer.federation.mean_strategies import EveryStep, FedAdam, FedAvg, FedAvgFrozenA, FedProx
from cutlayer.federation.robust_strategies import Median, Svd, TrimmedMean
from cutlayer.federation.strategy_registry import STRATEGIES, Strategies, Strategy
from cutlayer.federation.strategy_settings import StrategySettings

__all__ = [
    "STRATEGIES",
    "EveryStep",
    "FedAdam",
    "FedAvg",
    "FedAvgFrozenA",
    "FedProx",
    "Median",
    "Strategies",
    "Strategy",
    "Svd",
    "TrimmedMean",
    "Update",
    "get_strategy",
]


def get_strategy(settings: StrategySettings) -> Strategy:
    """The strategy that the settings name, without moments.

    Raises:
        ConfigError: no strategy has that name; lists the known ones.
    """
    return STRATEGIES.get(settings.kind)(settings)
