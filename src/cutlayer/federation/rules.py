"""One federation's state as its settings lay it out: whose keys, what at the start, what to send.

It averages nothing (`rounds`) and asks nobody (`coordinator`).
"""

from collections.abc import Iterable, Mapping
from functools import cached_property

from torch import Tensor

from cutlayer.federation.cuts import Cuts, client_part, server_part, vector_layout
from cutlayer.federation.settings import FederationSettings, TrunkSharing
from cutlayer.federation.state import Layout, owned_key, owned_state, update_layout
from cutlayer.federation.strategy import STRATEGIES
from cutlayer.model.adapters import AdapterState, initial_state
from cutlayer.model.cut import Cut

__all__ = ["Rules"]


class Rules:
    """Settings and layouts together. The state has head, tail and trunk under distinct keys."""

    def __init__(self, settings: FederationSettings, ends: Layout, trunk: Layout) -> None:
        """Keep them.

        Args:
            settings: of the federation.
            ends: layout of head and tail, as all members have them; with mixed cuts of the
                blocks that the server does not hold.
            trunk: layout of the trunk, all blocks that the server holds.
        """
        self.settings = settings
        self.ends = {key: list(shape) for key, shape in sorted(ends.items())}
        self.trunk = {key: list(shape) for key, shape in sorted(trunk.items())}
        self.is_hidden = settings.secure.hides_aggregate
        self.freezes_a = STRATEGIES.get(settings.strategy.kind).freezes_a
        self.is_mixed = settings.mixed_cuts
        whole = {**self.ends, **self.trunk}
        self.told = {key: whole[key] for key in sorted(whole)} if self.is_mixed else self.ends
        """Layout of what ROUND carries: head and tail, or with mixed cuts the whole state."""
        self._update = update_layout(self.told, self.freezes_a)

    def update(self, cut: Cut | None = None) -> dict[str, list[int]]:
        """What a member's update has; it depends on its cut where cuts are mixed."""
        return self._update if cut is None else client_part(self._update, cut)

    def vector(self, cuts: Cuts) -> dict[str, list[int]]:
        """What members of an attempt mask; see `cuts.vector_layout`."""
        return vector_layout(self._update, cuts)

    def owner(self, member: str) -> str | None:
        """Whose trunk a member trains; None is the one that all share."""
        if self.settings.trunk is TrunkSharing.SHARED:
            return None
        if self.settings.trunk is TrunkSharing.CLIENT:
            return member
        return self.settings.group_of(member) or member

    def initial(self) -> AdapterState:
        """What ROUND carries before the first round, which everybody can compute."""
        return initial_state(self.told, self.settings.adapter.seed)

    def told_of(self, state: Mapping[str, Tensor]) -> AdapterState:
        """What ROUND carries."""
        return {key: state[key] for key in self.told}

    def trunk_of(
        self, state: Mapping[str, Tensor], member: str, cut: Cut | None = None
    ) -> AdapterState:
        """The trunk that a member's next round starts from; the blocks that its cut leaves it."""
        owner, start = self.owner(member), self._fresh_trunk
        keys = self.trunk if cut is None else server_part(self.trunk, cut)
        return {key: state.get(owned_key(owner, key), start[key]) for key in keys}

    def completed(self, state: AdapterState, members: Iterable[str]) -> AdapterState:
        """The state with a fresh trunk for those of these members that have none yet."""
        owners = {self.owner(member) for member in members}
        fresh = [owned_state(owner, self._fresh_trunk) for owner in owners]
        return {key: value for part in [*fresh, state] for key, value in part.items()}

    @cached_property
    def _fresh_trunk(self) -> AdapterState:
        return initial_state(self.trunk, self.settings.adapter.seed)
