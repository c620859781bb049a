"""Settings of a client: its parts, its link, how it trains and generates. It does nothing."""

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from cutlayer.client.hop_settings import HopSettings, check_hops
from cutlayer.client.recut_settings import RecutSettings
from cutlayer.client.tee_settings import ClientTeeSettings
from cutlayer.data.settings import DataSettings
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.optimizer import AdamWSettings
from cutlayer.model.part_settings import PartSettings, TrunkWeights
from cutlayer.privacy.mechanism import PrivacySettings
from cutlayer.settings import Settings
from cutlayer.tee.masked.settings import MaskedSettings
from cutlayer.web.settings import ApiSettings
from cutlayer.wire.endpoints import ConnectionSettings

__all__ = [
    "CheckSettings",
    "ClientSettings",
    "DraftKind",
    "GenerationSettings",
    "MembershipSettings",
    "ModelSettings",
    "RunSettings",
    "SamplingSettings",
    "Schedule",
    "SpeculationSettings",
    "TrainSettings",
]


class Schedule(StrEnum):
    """How the learning rate goes down after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class ModelSettings(PartSettings):
    """The model and where it is cut."""

    lower: int
    """Blocks in the head; 0 leaves the embedding alone."""
    upper: int
    """First block of the tail."""
    trunk_weights: TrunkWeights = TrunkWeights.FULL
    """How the server keeps the trunk's linear layers: full, int8 or nf4, which answer less exactly;
    another server is refused. docs/quantised.md."""


class RunSettings(Settings):
    """The owner's private folder."""

    folder: Path = Path("runs/default")
    """Adapters, optimizer, ledger, secret, audit log; mode 0700."""
    key_file: Path | None = None
    """Key that encrypts all of it at rest; None stores it plain."""
    record_file: Path | None = None
    """Write every frame as the server sees it here, for audits; None records nothing."""
    record_truth: bool = False
    """Write the private tokens behind it too, to that name with .truth, for scoring attacks."""
    event_folder: Path | None = None
    """Write losses and rates of training for TensorBoard here; needs the extra tensorboard."""


class MembershipSettings(Settings):
    """Take part in a federation; its coordinator gives rounds, steps and the way to aggregate."""

    name: str
    """The federation, as its coordinator calls it."""
    group_key_file: Path | None = None
    """The members' common key, where the aggregate is hidden from the server too."""
    share_plain_updates: bool = False
    """Accept a federation without secure aggregation: the server sees every update by itself."""
    publish_losses: bool = False
    """Show this owner's mean training loss of each round on the federation's page."""
    accept_rollback: bool = False
    """Go on where the coordinator now stands although it stood further before."""
    min_cohort: int = Field(default=3, ge=1)
    """Hand nothing in where fewer members are asked: the fewer, the more a sum tells of each."""
    min_threshold: float = Field(default=0.6, gt=0.5, le=1)
    """Join only where at least this share of holders is needed to open a member's secret."""
    revoked: Path | None = None
    """Revocation list from the federation's owner; neighbours on it are refused."""


class TrainSettings(Settings):
    """One fine-tuning run."""

    epochs: int | None = None
    """Times over the rows; or set `steps`. A federation sets neither: it has rounds."""
    steps: int | None = None
    """Optimizer steps."""
    rows_per_step: int = Field(default=8, ge=1)
    """Rows of one optimizer step."""
    micro_batch_rows: int | None = None
    """Rows of one call of the trunk; None is all rows of the step."""
    micro_batch_tokens: int | None = None
    """Tokens of one call of the trunk at most."""
    in_flight: int = Field(default=2, ge=1)
    """Micro-batches under way at once, so that client, link and server work together."""
    lr: float = Field(default=5e-4, gt=0)
    """Highest learning rate."""
    schedule: Schedule = Schedule.LINEAR
    """What follows the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly to `lr`."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the mean gradient over all three parts; 0 or None does not clip. To clip, the
    trunk is told the squared norm of head and tail, which no epsilon covers."""
    optimizer: AdamWSettings = AdamWSettings()
    """AdamW, the same at every part."""
    save_every: int = Field(default=20, ge=1)
    """Steps between two saved states on both sides."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations of the validation rows; None evaluates at the end."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a lower loss; None never stops early."""
    seed: int = Field(default=0, ge=0)
    """Order of the rows, and dropout."""

    @field_validator("clip_norm", mode="before")
    @classmethod
    def _zero_is_none(cls, value: object) -> object:
        # TOML has no null.
        return None if value == 0 else value


class SamplingSettings(Settings):
    """How the next token is chosen, at the client."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens of a reply at most."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep the k most likely tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the fewest tokens whose probabilities reach p."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Keep tokens of at least p times the highest probability."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divide (positive) or multiply (negative) logits of tokens seen before; 1 does nothing."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply; they are not part of it."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws; rows of a batch draw apart."""


class DraftKind(StrEnum):
    """Who guesses the next tokens, for the trunk to verify in one round trip."""

    NONE = "none"
    LOOKUP = "lookup"
    SELF = "self"
    MODEL = "model"


class SpeculationSettings(Settings):
    """Guess several tokens, verify them in one round trip; docs/speculation.md."""

    kind: DraftKind = DraftKind.LOOKUP
    """none; lookup: what followed the same tokens before; self: head and tail without the trunk;
    model: a small model in `model`."""
    max_tokens: int = Field(default=8, ge=1, le=64)
    """Guesses of one round trip at most; fewer where they are seldom right."""
    min_match: int = Field(default=2, ge=1)
    """lookup: tokens that must be equal before a guess."""
    model: str | None = None
    """model: folder, GGUF file or hub id of a small model with the same tokenizer."""


class GenerationSettings(Settings):
    """How streams share the owner's machine and the link."""

    max_streams: int = Field(default=32, ge=1)
    """Streams that decode together; further ones wait."""
    prefill_tokens: int = Field(default=256, ge=1)
    """Prompt tokens of one call of the trunk: streams that decode wait no longer than for these."""
    keep_rows: int = Field(default=8, ge=0)
    """Finished conversations that stay cached: a next turn then sends its new part alone."""
    keep_s: float = Field(default=300.0, gt=0)
    """How long they are kept."""
    speculation: SpeculationSettings = SpeculationSettings()
    """Guesses that are verified together."""


class CheckSettings(Settings):
    """What is checked of the server's replies beyond their form; docs/malicious-server.md."""

    profile: bool = True
    """Compare sizes and directions of replies with those of earlier ones; costs next to nothing."""
    spot_check_every: int | None = Field(default=None, ge=1)
    """Recompute a row of one in so many steps, and of as many generation calls, drawn at random;
    needs the trunk's weights in the model folder and memory for them. None recomputes nothing."""


class ClientSettings(Settings):
    """One data owner."""

    model: ModelSettings
    """Which model and which cut."""
    connection: ConnectionSettings
    """Where the trunk is and with which certificate."""
    privacy: PrivacySettings
    """What noise protects what leaves; required, so that a run without noise says so."""
    run: RunSettings = RunSettings()
    """Where the owner's state lies."""
    adapter: AdapterSettings = AdapterSettings()
    """What is trained."""
    data: DataSettings | None = None
    """Rows to train on; generation needs none."""
    train: TrainSettings | None = None
    """How to train; generation needs none."""
    federation: MembershipSettings | None = None
    """Train in rounds together with other owners; absent trains alone."""
    sampling: SamplingSettings = SamplingSettings()
    """How to choose tokens."""
    generation: GenerationSettings = GenerationSettings()
    """How streams share the machine and the link."""
    checks: CheckSettings = CheckSettings()
    """What is checked of the server's replies."""
    recut: RecutSettings = RecutSettings()
    """Moving the cut of a run that goes on; docs/recut.md."""
    tee: ClientTeeSettings | None = None
    """What the trunk must prove before anything leaves; absent asks for no proof."""
    masked: MaskedSettings | None = None
    """Run head's and tail's frozen linear layers masked on an accelerator; absent runs all here."""
    api: ApiSettings = ApiSettings()
    """The OpenAI-compatible endpoint and its chat page; docs/api.md."""
    hops: tuple[HopSettings, ...] = ()
    """Places of the trunk in order, docs/placements.md; none is one server at [connection]."""

    @model_validator(mode="after")
    def _is_a_chain(self) -> Self:
        try:
            address = self.connection.address
            check_hops(self.hops, self.model.lower, self.model.upper, address)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if self.hops and self.federation is not None:
            raise ValueError(
                "[federation] does not work with [[hops]]: its rounds have one trunk server; "
                "remove one of the two"
            )
        if len(self.hops) > 1 and self.run.record_file is not None:
            raise ValueError(
                "run.record_file records one trunk server and [[hops]] has more; remove it, or "
                "audit each cut with a run over one server"
            )
        return self

    @model_validator(mode="after")
    def _has_policies_that_act(self) -> Self:
        if self.federation is not None and self.recut.has_policy:
            raise ValueError(
                "policies of [recut] act between the steps of a run that trains alone, and "
                "[federation] trains in rounds; remove [recut.battery], [recut.memory] and "
                "[recut.link], and re-cut by hand"
            )
        return self

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if self.train is None:
            return self
        given = (self.train.epochs is not None) + (self.train.steps is not None)
        if self.federation is None and given != 1:
            raise ValueError("set train.epochs or train.steps, one of the two")
        if self.federation is not None and given:
            raise ValueError(
                "the federation's rounds say how long to train; remove train.epochs and train.steps"
            )
        return self
