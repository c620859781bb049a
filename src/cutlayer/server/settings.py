"""Settings of a trunk server. It does not load models nor open sockets."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cutlayer.federation.settings import FederationSettings
from cutlayer.model.part_settings import PartSettings, TrunkWeights
from cutlayer.server.replica_settings import ReplicaSettings
from cutlayer.server.sessions import SessionLimits
from cutlayer.server.tee_settings import ServerTeeSettings
from cutlayer.settings import Settings
from cutlayer.tee.masked.settings import MaskedSettings
from cutlayer.tee.private_model.source import PrivateModelSettings
from cutlayer.web.settings import HttpSettings
from cutlayer.wire.endpoints import ListenSettings

__all__ = ["BatchSettings", "LimitSettings", "ServerSettings", "StateSettings", "TrunkSettings"]

_GIB = 1 << 30


class TrunkSettings(PartSettings):
    """Which blocks of which model this server runs."""

    lower: int
    """First block of the trunk."""
    upper: int
    """Block after the trunk's last."""
    trunk_weights: TrunkWeights = TrunkWeights.FULL
    """How the frozen linear layers are kept: full, int8 or nf4 (4 bits); clients have to agree.
    int8 and nf4 need the extra quantised; docs/quantised.md."""


class LimitSettings(Settings):
    """What the server lends, in all and to one client."""

    max_graph_bytes: int = 8 * _GIB
    """Activations kept between FORWARD and BACKWARD; beyond it they are recomputed."""
    max_cache_bytes: int = 4 * _GIB
    """KV bytes of all sessions, as allocated; docs/serving.md."""
    max_client_cache_bytes: int = 2 * _GIB
    """KV bytes of one client."""
    max_client_sessions: int = 64
    """Open sessions of one client."""
    max_client_adapters: int = Field(default=8, ge=1)
    """Adapters that one client's sessions have in memory; sparse ones are large."""
    max_session_rows: int = Field(default=1024, ge=1)
    """Rows of one session: streams of one client that share its calls."""
    evict_after_s: float = Field(default=1.0, ge=0)
    """A row that idled for so long loses its cache when another needs the room; it is replayed."""
    max_client_runs: int = Field(default=4, ge=1)
    """Training runs of one client in memory; one more unloads the least recently used."""
    max_client_stored_runs: int = Field(default=100, ge=1)
    """Runs of one client on disk."""
    max_call_tokens: int = Field(default=32768, ge=1)
    """Tokens of one call."""
    max_micro_batches: int = Field(default=256, ge=1)
    """Micro-batches of one optimizer step."""
    max_step_bytes: int = Field(default=4 * _GIB, ge=1)
    """Hidden states and their gradients of one run's open step, which wait for its end."""
    max_adapter_rank: int = Field(default=256, ge=1)
    """Largest LoRA rank."""
    adapter_kinds: list[str] = Field(default=["lora", "prefix", "sparse"])
    """Kinds of adapters that clients may train."""
    max_virtual_tokens: int = Field(default=256, ge=1)
    """Largest prefix, in vectors per block."""
    max_sparse_ratio: float = Field(default=0.25, ge=0, le=1)
    """Largest share of the trunk's heads and rows that one client may train; it costs memory."""
    max_client_bytes_per_day: int | None = None
    """Bytes that one client may send in a day; None is no limit."""
    max_client_vectors_per_day: int | None = Field(default=None, ge=1)
    """Hidden states and gradients that one client may send in a day; None is no limit."""
    session_ttl_s: float = 600.0
    """An idle session is forgotten after this."""
    run_ttl_s: float = 3600.0
    """An idle run leaves memory after this; its saved steps stay."""

    def session_limits(self) -> SessionLimits:
        """The part that sessions know."""
        return SessionLimits(
            max_cache_bytes=self.max_cache_bytes,
            max_client_cache_bytes=self.max_client_cache_bytes,
            max_client_sessions=self.max_client_sessions,
            max_client_adapters=self.max_client_adapters,
            max_session_rows=self.max_session_rows,
            ttl_s=self.session_ttl_s,
            evict_after_s=self.evict_after_s,
        )


class BatchSettings(Settings):
    """Which clients' calls share one call of the trunk; docs/client-batch.md."""

    window_ms: float = Field(default=2.0, ge=0)
    """A forward waits this long for other clients that are active; alone, it does not wait."""
    backward_window_ms: float = Field(default=50.0, ge=0)
    """A joint backward waits this long for each further gradient; later ones run by themselves."""
    decode_patience: float = Field(default=0.75, ge=0, le=1)
    """Share of the time between two of its tokens that a stream may wait for others that are about
    to come, so that they share a call; 0 never waits, and a lone stream never does."""
    prefill_tokens: int = Field(default=256, ge=1)
    """Prompt tokens of one call, up to a quarter more if that is the rest of them; others' next
    tokens are made between the pieces of longer ones."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one call; None is 512 on a CPU, where longer calls are no faster, else 16384."""
    max_clients: int = Field(default=64, ge=1)
    """Clients of one call; 1 serves one client after the other."""

    def for_trunk(self, device: str, can_share: bool) -> "BatchSettings":
        """The same with what depends on the trunk filled in."""
        most = 512 if device == "cpu" else 16384
        changes = {
            "max_tokens": most if self.max_tokens is None else self.max_tokens,
            "max_clients": self.max_clients if can_share else 1,
        }
        return self.model_copy(update=changes)


class StateSettings(Settings):
    """Where the server keeps runs and its audit log."""

    folder: Path = Path("state")
    """Private folder, mode 0700."""
    key_file: Path | None = None
    """Key that encrypts saved steps at rest; None stores them plain."""


class ServerSettings(Settings):
    """One trunk server."""

    model: TrunkSettings
    """What it runs."""
    listen: ListenSettings
    """Where it listens and with which certificate."""
    limits: LimitSettings = LimitSettings()
    """What it lends."""
    batch: BatchSettings = BatchSettings()
    """Which clients' calls share one call of the trunk."""
    state: StateSettings = StateSettings()
    """What it keeps."""
    federation: FederationSettings | None = None
    """Rounds that this server coordinates; absent coordinates none."""
    tee: ServerTeeSettings | None = None
    """What it proves of itself, and wants of its clients; absent proves nothing."""
    private_model: PrivateModelSettings | None = None
    """What the model's owner keeps in hand; absent, clients take their adapters out."""
    masked: MaskedSettings | None = None
    """Run the trunk's frozen linear layers masked on an accelerator; absent runs all here."""
    replicas: ReplicaSettings = ReplicaSettings()
    """Copies of the trunk behind this address; none by default."""
    revoked: Path | None = None
    """Revocation list from the federation's owner; replaced at any time, also while serving."""
    health_port: int | None = Field(default=None, ge=0, le=65535)
    """Loopback port of /healthz, /readyz and /metrics; None serves none, 0 picks one."""
    http: HttpSettings | None = None
    """The web page, and `/metrics`, for whoever has the token; absent serves none."""
    drain_s: float = 30.0
    """After SIGTERM, calls in flight get this long."""

    @model_validator(mode="after")
    def _multiplies_in_one_way(self) -> Self:
        if self.masked is not None and self.model.trunk_weights is not TrunkWeights.FULL:
            raise ValueError(
                f'model.trunk_weights = "{self.model.trunk_weights}" keeps the linear layers that '
                '[masked] puts elsewhere in full; set it to "full", or remove [masked]'
            )
        return self

    @model_validator(mode="after")
    def _keeps_adapters_in_hand(self) -> Self:
        is_mixed = self.federation is not None and self.federation.mixed_cuts
        if is_mixed and self.private_model is not None and self.private_model.owner is not None:
            raise ValueError(
                "federation.mixed_cuts tells every member the trunk's adapters in each round, and "
                "private_model.owner lets none leave without a consent; set one cut for all, or "
                "remove private_model.owner"
            )
        return self
