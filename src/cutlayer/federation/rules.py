"""One federation's state as its settings lay it out: whose keys, what at the start, what to send.

It averages nothing (`rounds`) and asks nobody (`coordinator`).
"""

from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import Tensor

from cutlayer.federation.settings import FederationSettings, TrunkSharing
from cutlayer.federation.state import Layout, owned_key, owned_state, update_layout
from cutlayer.federation.strategy import STRATEGIES
from cutlayer.model.adapters import AdapterState, initial_state

__all__ = ["Rules"]


class Rules:
    """Settings and layouts together. The state has head, tail and trunk under distinct keys."""

    def __init__(self, settings: FederationSettings, ends: Layout, trunk: Layout) -> None:
        """Keep them.

        Args:
            settings: of the federation.
            ends: layout of head and tail, as all members have them.
            trunk: layout of the trunk.
        """
        self.settings = settings
        self.ends = {key: list(shape) for key, shape in sorted(ends.items())}
        self.trunk = {key: list(shape) for key, shape in sorted(trunk.items())}
        self.is_hidden = settings.secure.hides_aggregate
        self.freezes_a = STRATEGIES.get(settings.strategy.kind).freezes_a
        self.update = update_layout(self.ends, self.freezes_a)
        """What a member's update of head and tail has."""

    def owner(self, member: str) -> str | None:
        """Whose trunk a member trains; None is the one that all share."""
        if self.settings.trunk is TrunkSharing.SHARED:
            return None
        if self.settings.trunk is TrunkSharing.CLIENT:
            return member
        return self.settings.group_of(member) or member

    def initial(self) -> AdapterState:
        """Head and tail before the first round, which everybody can compute."""
        return initial_state(self.ends, self.settings.adapter.seed)

    def ends_of(self, state: Mapping[str, Tensor]) -> AdapterState:
        """Head and tail."""
        return {key: state[key] for key in self.ends}

    def trunk_of(self, state: Mapping[str, Tensor], member: str) -> AdapterState:
        """The trunk that a member's next round starts from."""
        owner = self.owner(member)
        start = self._fresh_trunk
        return {key: state.get(owned_key(owner, key), start[key]) for key in self.trunk}

    def completed(self, state: AdapterState, members: Iterable[str]) -> AdapterState:
        """The state with a fresh trunk for those of these members that have none yet."""
        owners = {self.owner(member) for member in members}
        fresh = [owned_state(owner, self._fresh_trunk) for owner in owners]
        return {key: value for part in [*fresh, state] for key, value in part.items()}

    @cached_property
    def _fresh_trunk(self) -> AdapterState:
        return initial_state(self.trunk, self.settings.adapter.seed)
