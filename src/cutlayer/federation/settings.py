"""Settings of a federation: who, how often, by which rule, and how updates are kept secret.

It does nothing. The part that members are told is `FederationPolicy`.
"""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from cutlayer.federation.strategy import STRATEGIES
from cutlayer.federation.strategy_settings import StrategySettings
from cutlayer.federation.trunk_pool import UpdateKind
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.cut import Part
from cutlayer.settings import Settings

__all__ = [
    "FederationPolicy",
    "FederationSettings",
    "SecureSettings",
    "StrategySettings",
    "TrunkSharing",
]

MIN_SECURE_COHORT = 3
"""With two members each would know the other's update from the sum."""


class TrunkSharing(StrEnum):
    """Whose trunk adapters become one at the end of a round."""

    SHARED = "shared"
    """All members': one trunk adapter."""
    CLIENT = "client"
    """Nobody's: every member keeps its own."""
    GROUP = "group"
    """Those of a group of `federation.groups`."""


class SecureSettings(Settings):
    """Secure aggregation of head and tail updates."""

    enabled: bool = True
    """Off, the server sees every member's update; members must agree to it in their settings."""
    threshold: float = Field(default=0.67, gt=0.5, le=1)
    """Share of a member's holders (its neighbours and itself) that open a secret; at least 3."""
    neighbours: int | None = Field(default=None, ge=2)
    """Neighbours of a member; None grows with the logarithm of the cohort."""
    value_range: float = Field(default=16.0, gt=0)
    """Values are clipped to plus and minus this before they are masked."""
    value_bits: int = Field(default=28, ge=8, le=40)
    """Binary places after the point."""
    max_weight: int = Field(default=1 << 20, ge=1)
    """Largest weight (scored tokens) of one member in a round; more counts as this."""
    hides_aggregate: bool = False
    """The sum stays hidden from the server too; members share a group key."""


class FederationPolicy(Settings):
    """What a member is told when it joins."""

    name: str = Field(pattern=r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
    """The federation's name."""
    rounds: int = Field(ge=1)
    """Rounds to train."""
    local_steps: int = Field(default=10, ge=1)
    """Optimizer steps of each member in a round; every_step takes exactly one gradient."""
    adapter: AdapterSettings = AdapterSettings()
    """What is trained; members must have the same."""
    strategy: StrategySettings = StrategySettings()
    """How updates become the next round's adapters."""
    secure: SecureSettings = SecureSettings()
    """How updates are kept secret."""
    trunk: TrunkSharing = TrunkSharing.SHARED
    """Whose trunk adapters become one."""
    mixed_cuts: bool = False
    """Members choose their own cuts within the server's blocks; false demands one cut of all."""

    @model_validator(mode="after")
    def _strategy_sees_enough(self) -> Self:
        if self.strategy.kind not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ValueError(f"no strategy is called {self.strategy.kind!r}; known: {known}")
        strategy = STRATEGIES.get(self.strategy.kind)
        if strategy.needs_lora and self.adapter.kinds != ["lora"]:
            raise ValueError(
                f"strategy {self.strategy.kind} works on LoRA's factors A and B, and the adapter "
                f"is {' + '.join(self.adapter.kinds)}; choose fedavg, or adapter.kinds = ['lora']"
            )
        if self.secure.enabled and strategy.needs_single_updates:
            raise ValueError(
                f"strategy {self.strategy.kind} needs to see every member's update, and secure "
                "aggregation shows their sum alone; only where the aggregation runs in an "
                "attested enclave can both hold (`cutlayer enclave`, its rounds). Here choose "
                "fedavg, fedavg_frozen_a, fedprox, fedadam or every_step, or set "
                "secure.enabled=false to show updates to the server"
            )
        if self.secure.hides_aggregate and not self.secure.enabled:
            raise ValueError("secure.hides_aggregate needs secure.enabled")
        if self.secure.hides_aggregate and strategy.sends is not UpdateKind.DELTA:
            raise ValueError(
                f"strategy {self.strategy.kind} steps at the server, which cannot see a hidden "
                "aggregate; set secure.hides_aggregate=false or choose another strategy"
            )
        return self

    @model_validator(mode="after")
    def _can_mix_cuts(self) -> Self:
        if not self.mixed_cuts:
            return self
        missing = sorted(set(Part) - set(self.adapter.parts))
        if missing:
            raise ValueError(
                f"mixed_cuts needs adapter.parts with all of head, trunk and tail ({missing} "
                "missing): a block that one member has in its head is in another's trunk, so a "
                "part that stays frozen would be trained all the same"
            )
        if self.trunk is not TrunkSharing.SHARED:
            raise ValueError(
                f"mixed_cuts needs trunk = 'shared', not {self.trunk.value!r}: a block that a "
                "member trains at its client belongs to everybody, and so it must at the server"
            )
        if self.secure.hides_aggregate:
            raise ValueError(
                "mixed_cuts cannot hide the aggregate: the server trains for some members the "
                "very blocks that others train at their clients, so it has to see their mean; set "
                "secure.hides_aggregate=false, or one cut for all"
            )
        if self.secure.enabled and self.secure.value_range < 1:
            raise ValueError(
                f"mixed_cuts needs secure.value_range of at least 1, not "
                f"{self.secure.value_range:g}: who holds a block is added up as ones"
            )
        return self

    def told(self) -> str:
        """The JSON that JOINED carries; without what members of the first release do not know."""
        return self.model_dump_json(exclude=None if self.mixed_cuts else {"mixed_cuts"})

    def round_adapter(self) -> AdapterSettings:
        """What members and the trunk train: `adapter`, without A where the strategy freezes it."""
        if not STRATEGIES.get(self.strategy.kind).freezes_a:
            return self.adapter
        return self.adapter.model_copy(update={"train_a": False})


class FederationSettings(FederationPolicy):
    """One federation, as its coordinator runs it."""

    members: list[str] = Field(default_factory=list)
    """Certificate names that may join; empty admits every certificate with the role train."""
    groups: dict[str, list[str]] = Field(default_factory=dict)
    """Members of each group, for trunk = "group"."""
    cohort: int | None = Field(default=None, ge=1)
    """Members asked in a round; None asks all who wait."""
    min_members: int = Field(default=3, ge=1)
    """A round begins when so many wait."""
    quorum: int = Field(default=3, ge=1)
    """Fewer updates than this are no round."""
    gather_s: float = Field(default=5.0, ge=0)
    """How long a round waits for more members after `min_members` are there."""
    phase_deadline_s: float = Field(default=60.0, gt=0)
    """Each step of secure aggregation but the training."""
    round_deadline_s: float = Field(default=3600.0, gt=0)
    """Training and sending the update; who is later is a straggler."""
    max_attempts: int = Field(default=20, ge=1)
    """Begins of one round before the federation stops with QuorumNotMet."""
    seed: int = 0
    """Of cohorts and graphs."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.quorum > self.min_members:
            raise ValueError(
                f"federation.quorum={self.quorum} exceeds min_members={self.min_members}; "
                "a round could never end"
            )
        if self.cohort is not None and self.cohort < self.quorum:
            raise ValueError(f"federation.cohort={self.cohort} is below quorum={self.quorum}")
        if self.secure.enabled and self.quorum < MIN_SECURE_COHORT:
            raise ValueError(
                f"federation.quorum={self.quorum}: secure aggregation needs {MIN_SECURE_COHORT}, "
                "for with fewer a member can compute another's update; set secure.enabled=false "
                "to share updates in the open"
            )
        if (self.trunk is TrunkSharing.GROUP) != bool(self.groups):
            raise ValueError('federation.groups belongs to trunk = "group", and only to it')
        self._check_groups()
        return self

    def group_of(self, member: str) -> str | None:
        """The member's group; None where it is in none."""
        return next((name for name, members in self.groups.items() if member in members), None)

    def _check_groups(self) -> None:
        grouped = [member for members in self.groups.values() for member in members]
        twice = sorted({member for member in grouped if grouped.count(member) > 1})
        missing = sorted(set(self.members) - set(grouped)) if self.groups else []
        if twice or missing:
            raise ValueError(
                f"federation.groups: every member is in exactly one group; {twice} are in more, "
                f"{missing} in none"
            )

    def policy(self) -> FederationPolicy:
        """The part that members are told."""
        return FederationPolicy(**{name: getattr(self, name) for name in _POLICY_FIELDS})


_POLICY_FIELDS = tuple(FederationPolicy.model_fields)
