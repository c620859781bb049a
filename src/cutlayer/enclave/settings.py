"""Settings of an enclave: its model, its memory for rows, its rounds. It does not load or listen.

What an owner sets is in `owner_settings`.
"""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cutlayer.enclave.row_store import RowSettings
from cutlayer.errors import ConfigError
from cutlayer.federation.settings import FederationSettings, SecureSettings
from cutlayer.federation.strategy_settings import StrategySettings
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.part_settings import PartSettings
from cutlayer.model.partition import Part
from cutlayer.server.settings import (
    BatchSettings,
    LimitSettings,
    ServerSettings,
    StateSettings,
    TrunkSettings,
)
from cutlayer.server.tee_settings import ServerTeeSettings
from cutlayer.settings import Settings
from cutlayer.tee.masked.settings import MaskedSettings
from cutlayer.tee.private_model.source import PrivateModelSettings
from cutlayer.tee.process.confine import ConfinementSettings
from cutlayer.wire.endpoints import ListenSettings

__all__ = [
    "EnclaveProcess",
    "EnclaveSettings",
    "EnclaveState",
    "InnerSettings",
    "RoundSettings",
    "inside",
]


class InnerSettings(PartSettings):
    """Which blocks of which model the enclave runs."""

    lower: int = Field(ge=1)
    """First block inside; the owners have the embedding and the blocks before it."""
    device: str = "cpu"
    """torch device; a GPU only where it is in confidential mode too."""


class EnclaveState(Settings):
    """What outlives a restart: adapters and optimizers of saved steps, always sealed."""

    folder: Path = Path("enclave-state")
    """Private folder, mode 0700."""
    key_file: Path = Path("enclave.key")
    """Key that seals it, made at the first start; it has to lie where the host cannot read."""


class RoundSettings(Settings):
    """Rounds of several owners, averaged inside: nobody outside sees one owner's update."""

    name: str = Field(pattern=r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
    """What the owners' settings call it."""
    rounds: int = Field(ge=1)
    """How many."""
    local_steps: int = Field(default=10, ge=1)
    """Optimizer steps of each owner in a round."""
    adapter: AdapterSettings = AdapterSettings()
    """What is trained; owners must have the same. Its `parts` do not matter: it is all inside."""
    strategy: StrategySettings = StrategySettings()
    """How updates become the next round's adapter; all but fedprox, whose pull is at the owners."""
    members: list[str] = Field(default_factory=list)
    """Certificate names that may join; empty admits every certificate with the role train."""
    min_members: int = Field(default=3, ge=1)
    """A round begins when so many wait."""
    quorum: int = Field(default=3, ge=1)
    """Fewer updates than this are no round."""
    min_cohort: int = Field(default=3, ge=1)
    """Owners whose updates an average has at least, whoever began; not above `quorum`. An average
    of one is that owner's update, which the others then have."""
    gather_s: float = Field(default=5.0, ge=0)
    """How long a round waits for more owners after `min_members` are there."""
    deadline_s: float = Field(default=3600.0, gt=0)
    """Time to train; who is later is left out of the round."""
    max_weight: int = Field(default=1 << 20, ge=1)
    """Largest weight (scored tokens) of one owner in a round; more counts as this."""
    max_attempts: int = Field(default=20, ge=1)
    """Begins of one round before the enclave gives up."""

    @model_validator(mode="after")
    def _pulls_nobody(self) -> Self:
        if self.strategy.kind == "fedprox":
            raise ValueError(
                "strategy fedprox pulls at what trains at the owners, and here nothing does; "
                "choose fedavg, fedavg_frozen_a, fedadam, svd, median, trimmed_mean or every_step"
            )
        return self

    @model_validator(mode="after")
    def _averages_enough(self) -> Self:
        if self.quorum < self.min_cohort:
            raise ValueError(
                f"rounds.quorum={self.quorum} is below rounds.min_cohort={self.min_cohort}: a "
                f"round could end as the average of {self.quorum}, which tells the others what "
                "these have learnt; raise the quorum, or lower min_cohort to what the owners "
                "accept (their own rounds.min_cohort)"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        # The coordinator's own rules, when the settings are read and not in the middle of a start.
        self.federation()
        return self

    def federation(self) -> FederationSettings:
        """The same for the coordinator: the updates that it averages never leave the enclave."""
        return FederationSettings(
            name=self.name,
            rounds=self.rounds,
            local_steps=self.local_steps,
            adapter=inside(self.adapter),
            strategy=self.strategy,
            secure=SecureSettings(enabled=False, max_weight=self.max_weight),
            members=self.members,
            min_members=self.min_members,
            quorum=self.quorum,
            gather_s=self.gather_s,
            round_deadline_s=self.deadline_s,
            max_attempts=self.max_attempts,
        )


class EnclaveProcess(Settings):
    """A confined process for development and as defence in depth; it stays SIMULATED."""

    uid: int | None = Field(default=None, ge=1)
    """User id to become where the process runs as root, its own alone; None stays what it is."""
    seccomp: bool = True
    """No new sockets, programs or processes, nor looks into others; needs the extra `tee`."""
    landlock: bool = True
    """No files but the model, the state and the system's own; where the kernel has it."""
    lock_memory: bool = True
    """Nothing goes to the swap; where the limit allows it."""
    required: bool = False
    """Refuse to serve where any of it could not be applied."""


class EnclaveSettings(Settings):
    """One enclave."""

    model: InnerSettings
    """What it runs."""
    listen: ListenSettings
    """Where it listens and with which certificate."""
    rows: RowSettings = RowSettings()
    """What it keeps of rows, so that each is sent once."""
    limits: LimitSettings = LimitSettings()
    """What it lends beside that."""
    batch: BatchSettings = BatchSettings()
    """Which owners' calls share one call of the blocks."""
    state: EnclaveState = EnclaveState()
    """What outlives a restart."""
    rounds: RoundSettings | None = None
    """Rounds of several owners; absent, each trains for itself."""
    tee: ServerTeeSettings | None = None
    """What it proves of itself, and wants of owners; absent, only owners who waive proof come."""
    private_model: PrivateModelSettings | None = None
    """What the model's owner keeps in hand; absent, owners of rows take their adapters out."""
    masked: MaskedSettings | None = None
    """Run the frozen linear layers masked on an accelerator; absent runs all inside."""
    process: EnclaveProcess | None = None
    """What the process gives up once it listens, on machines without a TEE: SIMULATED; absent
    gives up nothing."""
    revoked: Path | None = None
    """Revocation list from the owners' authority; replaced at any time, also while serving."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """Loopback port of /healthz, /readyz and /metrics; None serves none, 0 picks one."""
    drain_s: float = 30.0
    """After SIGTERM, calls in flight get this long."""
    shared_labels: bool = False
    """Take labels of owners without proving what runs here: labels and text distribution are then
    visible to this machine's operator. An enclave with [tee] takes them anyway."""

    @property
    def takes_labels(self) -> bool:
        """Whether rows may bring their labels."""
        return self.tee is not None or self.shared_labels

    def confinement(self) -> ConfinementSettings | None:
        """What `tee.process` is to apply, with the files that this enclave still needs.

        Raises:
            ConfigError: the model would have to be fetched, which a confined process cannot.
        """
        if self.process is None:
            return None
        if self.process.landlock and not Path(self.model.path).exists():
            raise ConfigError(
                f"model.path={self.model.path} is no file or folder here, and a confined process "
                "fetches nothing: use `cutlayer assets fetch` first, or process.landlock = false"
            )
        tls, private = self.listen.tls, self.private_model
        # What is renewed, revoked or consented to while it serves is read again.
        read = [Path(self.model.path), self.revoked]
        read += [] if tls is None else [tls.certificate, tls.key, tls.authority]
        read += [] if self.tee is None else [self.tee.attester.folder, self.tee.key_folder]
        read += [] if private is None else [private.consents]
        written = [self.state.folder, None if private is None else private.exchange]
        return ConfinementSettings(
            **self.process.model_dump(), readable=_there(read), writable=_there(written)
        )

    def as_server(self) -> ServerSettings:
        """The same for the machinery of a trunk server."""
        # All blocks from there on are inside; how many is known when the model is open.
        upper = self.model.lower + 1
        return ServerSettings(
            model=TrunkSettings(**self.model.model_dump(), upper=upper),
            listen=self.listen,
            limits=self.limits,
            batch=self.batch,
            state=StateSettings(folder=self.state.folder, key_file=self.state.key_file),
            federation=None if self.rounds is None else self.rounds.federation(),
            tee=self.tee,
            private_model=self.private_model,
            masked=self.masked,
            revoked=self.revoked,
            health_port=self.health_port,
            drain_s=self.drain_s,
        )


def inside(adapter: AdapterSettings) -> AdapterSettings:
    """The adapter where all that trains is inside the enclave."""
    return adapter.model_copy(update={"parts": [Part.TAIL]})


def _there(paths: list[Path | None]) -> list[Path]:
    return [path.absolute() for path in paths if path is not None and path.exists()]
