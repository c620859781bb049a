"""What a client believes of the model, and how it reaches its server. It does not connect."""

import logging
from collections.abc import Callable, Mapping

from cutlayer.client.attested import Attestation, attestation_of
from cutlayer.client.link import Connect, OwnModel
from cutlayer.client.run_file import saved_cut
from cutlayer.client.settings import ClientSettings, TrainSettings
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.agreement import hash_leaves, known_manifest
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Cut
from cutlayer.settings import parse_settings, settings_digest
from cutlayer.wire.channel import Channel
from cutlayer.wire.endpoints import ConnectionSettings
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.messages import OpenRun
from cutlayer.wire.spec import Spec

__all__ = [
    "at_cut",
    "at_run_s_cut",
    "cut_of",
    "model_identity",
    "opener",
    "own_model",
    "placed",
    "run_call",
    "run_identity",
]

_log = logging.getLogger(__name__)


def at_cut(settings: ClientSettings, cut: Cut) -> ClientSettings:
    """The same settings with another cut."""
    model = settings.model.model_copy(update={"lower": cut.lower, "upper": cut.upper})
    return settings.model_copy(update={"model": model})


def cut_of(settings: ClientSettings) -> Cut:
    """Where these settings cut."""
    return Cut(settings.model.lower, settings.model.upper)


def at_run_s_cut(settings: ClientSettings) -> ClientSettings:
    """The settings with the cut where the run's last re-cut left it; theirs may be older.

    Raises:
        StorageError: the run's file cannot be read.
    """
    model, cut = settings.model, saved_cut(settings.run)
    if cut is None or cut == cut_of(settings):
        return settings
    _log.warning(
        "the run in %s was re-cut to lower=%d, upper=%d, which it keeps; the settings still say "
        "%d and %d",
        settings.run.folder,
        cut.lower,
        cut.upper,
        model.lower,
        model.upper,
    )
    return at_cut(settings, cut)


def own_model(settings: ClientSettings, folder: ModelFolder, loaded: Mapping[str, str]) -> OwnModel:
    """The spec of these settings and the manifest leaves of the loaded parts (none for a check).

    Raises:
        SpecMismatch: the files are not the ones that the model's manifest describes.
    """
    config, codec = folder.config, settings.connection.codec
    spec = Spec(
        model_type=config.model_type,
        n_block=config.num_hidden_layers,
        lower=settings.model.lower,
        upper=settings.model.upper,
        hidden_size=config.hidden_size,
        dtype=settings.model.trunk_weights.told(settings.model.dtype),
        codec_up=codec,
        codec_down=codec,
    )
    manifest = known_manifest(folder, loaded)
    return OwnModel(spec=spec, manifest=manifest, digest=settings.model.digest)


def run_identity(
    settings: ClientSettings, train: TrainSettings, data_digest: str, leaves: Mapping[str, str]
) -> dict[str, str]:
    """What must stay the same for a run to be continued, by name."""
    federation = settings.federation
    return {
        "data": data_digest,
        **model_identity(settings, leaves),
        "order": f"{train.seed}:{train.rows_per_step}",
        **({} if federation is None else {"federation": federation.name}),
    }


def model_identity(settings: ClientSettings, leaves: Mapping[str, str]) -> dict[str, str]:
    """What of it can be told without rows: what is trained, at which cut and with which noise."""
    model = settings.model
    return {
        "adapter": settings_digest(settings.adapter),
        "cut": f"{model.lower}:{model.upper}",
        "privacy": settings_digest(settings.privacy.noise()),
        "model": hash_leaves(leaves),
        "dtype": model.trunk_weights.told(model.dtype),
    }


def run_call(
    run_id: str, adapter: AdapterSettings, train: TrainSettings, wants_input_grad: bool
) -> OpenRun:
    """What the server is told of a run; whoever sends it adds the saved steps."""
    return OpenRun(
        run_id=run_id,
        adapter=adapter.model_dump(mode="json"),
        optimizer=train.optimizer.model_dump(),
        clip_norm=train.clip_norm,
        wants_input_grad=wants_input_grad,
        seed=train.seed,
        saved_steps=[],
    )


def opener(
    settings: ClientSettings,
    attestation: Attestation | None = None,
    connect: Callable[[], Channel] | None = None,
) -> Connect:
    """Opens channels by gRPC to the server of the settings, or to a replica that it names.

    Args:
        settings: of the owner; with a section [tee] the server has to prove what it runs.
        attestation: of these settings, where somebody wants its verdicts; None makes it.
        connect: opens all channels in place of gRPC.

    Raises:
        ConfigError: the section [tee] is wrong, or cannot be kept by `connect`.
    """
    if connect is not None:
        if settings.tee is not None:
            raise ConfigError("[tee] vouches for TLS keys; it needs channels by gRPC, not others")
        return lambda place: connect()
    proof = attestation or attestation_of(settings)

    def open_channel(place: str | None) -> Channel:
        where = placed(settings.connection, place)
        return GrpcChannel(where) if proof is None else proof.open(where)

    return open_channel


def placed(settings: ConnectionSettings, place: str | None) -> ConnectionSettings:
    """The same link to another address; the server chose it, so it is checked as a setting is."""
    if place is None:
        return settings
    table = {**settings.model_dump(), "address": place}
    return parse_settings(ConnectionSettings, table, "the replica that the server named")
