"""Settings of an owner whose later blocks are in an enclave. It does nothing.

What the enclave sets is in `settings`.
"""

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cutlayer.client.hop_settings import HopSettings, check_hops
from cutlayer.client.hops import hop_view
from cutlayer.client.settings import (
    CheckSettings,
    ClientSettings,
    DraftKind,
    GenerationSettings,
    MembershipSettings,
    ModelSettings,
    RunSettings,
    SamplingSettings,
    TrainSettings,
)
from cutlayer.client.tee_settings import ClientTeeSettings
from cutlayer.data.settings import DataSettings
from cutlayer.enclave.settings import inside
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.chain import Hop, PlaceKind, Placement
from cutlayer.model.part_settings import PartSettings
from cutlayer.privacy.mechanism import PrivacySettings
from cutlayer.settings import Settings
from cutlayer.tee.attester import AttesterSettings
from cutlayer.wire.endpoints import ConnectionSettings

__all__ = [
    "EnclaveClientSettings",
    "FrontSettings",
    "LabelPlace",
    "OwnerTeeSettings",
    "SharedRounds",
]


class LabelPlace(StrEnum):
    """Where labels are, and so where the loss is computed."""

    CLIENT = "client"
    """At the owner: logits come back, the gradient at the logits goes up."""
    ENCLAVE = "enclave"
    """With the rows, in the attested enclave; the summed loss comes back."""
    SERVER = "server"
    """With the rows, at a server that proves nothing: labels and text distribution are visible
    there, which the owner accepts by this word and the server by `shared_labels`."""


class FrontSettings(PartSettings):
    """The owner's part of the model: the embedding and the blocks before the enclave's, frozen."""

    lower: int = Field(ge=1)
    """Blocks here; the enclave has all others and the LM head."""


class SharedRounds(Settings):
    """Train in the enclave's rounds together with other owners."""

    name: str
    """As the enclave's settings call the rounds."""
    min_cohort: int = Field(default=3, ge=1)
    """Train only where so many take part: the fewer, the more the average tells of each."""
    accept_rollback: bool = False
    """Go on where the enclave now stands although it stood further before."""


class OwnerTeeSettings(Settings):
    """What the enclave must prove before anything leaves; docs/attested-channel.md."""

    required: bool = True
    """Without accepted evidence not one tensor leaves. False goes on without proof: whoever runs
    the other side may then read rows and, from gradients, labels."""
    policy: Path | None = None
    """What is accepted: a file made by `cutlayer attest policy init`; needed where `required`."""
    reattest_s: float = Field(default=300.0, gt=0)
    """Seconds after which the enclave must prove anew before the next call; rounds ask too."""
    attester: AttesterSettings | None = None
    """Where this side's own evidence comes from, for enclaves that want it."""
    adapter_key_file: Path | None = None
    """Key (64 hex digits, mode 0600) that seals this owner's adapter at the enclave; released to
    it once it is accepted. None leaves that to the enclave's own key. Not in rounds."""

    def as_client(self) -> ClientTeeSettings | None:
        """The same for the machinery of a client; None asks for no proof."""
        if self.policy is None:
            return None
        return ClientTeeSettings(**self.model_dump())


class EnclaveClientSettings(Settings):
    """One data owner of an enclave."""

    labels: LabelPlace = LabelPlace.CLIENT
    """client: labels stay here; enclave: they go to it with the rows, only if it is attested;
    server: they go to a server that proves nothing and sees them, docs/placements.md."""
    model: FrontSettings
    """Which model, and which blocks of it are here."""
    connection: ConnectionSettings
    """Where the enclave is and with which certificate."""
    run: RunSettings = RunSettings()
    """Where the owner's state lies."""
    adapter: AdapterSettings = AdapterSettings()
    """What is trained. Its `parts` do not matter: all of it is inside."""
    data: DataSettings | None = None
    """Rows to train on; generation needs none."""
    train: TrainSettings | None = None
    """How to train; generation needs none."""
    rounds: SharedRounds | None = None
    """Train in rounds together with other owners; absent trains alone."""
    tee: OwnerTeeSettings = Field(default_factory=OwnerTeeSettings)
    """What the enclave must prove; proof is required unless it is waived here."""
    sampling: SamplingSettings = SamplingSettings()
    """How to choose tokens."""
    generation: GenerationSettings = GenerationSettings()
    """How streams share the machine and the link."""
    hops: tuple[HopSettings, ...] = ()
    """Frozen trunk servers between the owner's blocks and the enclave's, in order; each says where
    it is. The enclave begins where the last one ends. docs/placements.md."""

    @property
    def inner_lower(self) -> int:
        """First block inside."""
        return self.hops[-1].upper if self.hops else self.model.lower

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.generation.speculation.kind is DraftKind.SELF:
            raise ValueError(
                "speculation.kind=self needs the LM head, which is in the enclave; choose lookup, "
                "model or none"
            )
        if self.run.record_file is not None or self.run.record_truth:
            raise ValueError(
                "recordings are for audits of what a trunk server sees; remove run.record_file"
            )
        self._check_tee()
        self._check_chain()
        self.as_client(self.inner_lower + 1)
        return self

    def _check_chain(self) -> None:
        try:
            address = self.connection.address
            check_hops(self.hops, self.model.lower, self.inner_lower, address, has_own_first=True)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.hops and self.rounds is not None:
            raise ValueError(
                "[rounds] does not work with [[hops]]: its owners share one front; remove one"
            )

    def _check_tee(self) -> None:
        if self.tee.required and self.tee.policy is None:
            raise ValueError(
                "tee.policy is missing: make one with `cutlayer attest policy init`, or say "
                "tee.required = false to send rows to a place that proves nothing"
            )
        if self.labels is LabelPlace.ENCLAVE and not self.tee.required:
            raise ValueError(
                'labels = "enclave" needs tee.required = true: labels go to nobody who has not '
                'proved what it runs, unless labels = "server" accepts that they are visible there'
            )
        if self.labels is not LabelPlace.SERVER:
            return
        if self.tee.required or self.tee.policy is not None:
            raise ValueError(
                'labels = "server" is for a place that proves nothing: set tee.required = false '
                'and no tee.policy, or labels = "enclave" for a place that proves what it runs'
            )
        if self.rounds is not None:
            raise ValueError(
                "[rounds] hide each update inside an enclave, which a server that proves nothing "
                "does not promise; remove [rounds], or use an enclave"
            )

    def as_client(self, num_blocks: int) -> ClientSettings:
        """The same for the machinery of a client, without noise: the other side is attested.

        Args:
            num_blocks: of the whole model; all from `inner_lower` on are in the enclave.
        """
        own = {**self.model.model_dump(), "lower": self.inner_lower}
        return ClientSettings(
            model=ModelSettings(**own, upper=num_blocks),
            connection=self.connection,
            privacy=PrivacySettings(mechanism="none"),
            run=self.run,
            adapter=inside(self.adapter),
            data=self.data,
            train=self.train,
            federation=self._membership(),
            sampling=self.sampling,
            generation=self.generation,
            tee=self.tee.as_client(),
            checks=CheckSettings(profile=False),
        )

    def hop_views(self, num_blocks: int) -> tuple[ClientSettings, ...]:
        """Per server in the middle the settings of a U over it.

        Args:
            num_blocks: of the whole model.
        """
        client = self.as_client(num_blocks)
        # What is attested needs no profile of its replies; these servers need one.
        watched = client.model_copy(update={"checks": CheckSettings(), "tee": None})
        return tuple(hop_view(watched, hop) for hop in self.hops)

    def placement(self, num_blocks: int) -> Placement:
        """Where the blocks execute.

        Args:
            num_blocks: of the whole model.

        Raises:
            ConfigError: the places do not cover the model.
        """
        shares = self.labels is LabelPlace.SERVER
        last = PlaceKind.SERVER if shares else PlaceKind.ENCLAVE
        ends = (
            Hop(PlaceKind.CLIENT, range(self.model.lower)),
            Hop(last, range(self.inner_lower, num_blocks)),
        )
        hops = (ends[0], *(hop.hop for hop in self.hops), ends[1])
        return Placement(num_blocks=num_blocks, hops=hops, shares_labels=shares)

    def _membership(self) -> MembershipSettings | None:
        if self.rounds is None:
            return None
        # An update of this owner's machine is empty: all that learns is in the enclave.
        return MembershipSettings(
            name=self.rounds.name,
            min_cohort=self.rounds.min_cohort,
            accept_rollback=self.rounds.accept_rollback,
            share_plain_updates=True,
        )
