"""What a client believes of the model, and how it reaches its server. It does not connect."""

import time
from collections.abc import Mapping

from cutlayer.client.link import Connect, OwnModel
from cutlayer.client.settings import ClientSettings, TrainSettings
from cutlayer.model.agreement import hash_leaves, known_manifest
from cutlayer.model.folder import ModelFolder
from cutlayer.settings import parse_settings, settings_digest
from cutlayer.wire.channel import Channel
from cutlayer.wire.endpoints import ConnectionSettings
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.recording import RecordingChannel
from cutlayer.wire.spec import Spec

__all__ = ["opener", "own_model", "placed", "run_identity"]


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
        dtype=settings.model.dtype,
        codec_up=codec,
        codec_down=codec,
    )
    manifest = known_manifest(folder, loaded)
    return OwnModel(spec=spec, manifest=manifest, digest=settings.model.digest)


def run_identity(
    settings: ClientSettings, train: TrainSettings, data_digest: str, leaves: Mapping[str, str]
) -> dict[str, str]:
    """What must stay the same for a run to be continued, by name."""
    model, federation = settings.model, settings.federation
    return {
        "data": data_digest,
        "adapter": settings_digest(settings.adapter),
        "cut": f"{model.lower}:{model.upper}",
        "privacy": settings_digest(settings.privacy.noise()),
        "model": hash_leaves(leaves),
        "dtype": model.dtype,
        "order": f"{train.seed}:{train.rows_per_step}",
        **({} if federation is None else {"federation": federation.name}),
    }


def opener(settings: ClientSettings) -> Connect:
    """Opens channels by gRPC to the server of the settings, or to a replica that it names."""

    def connect(place: str | None) -> Channel:
        channel: Channel = GrpcChannel(placed(settings.connection, place))
        if settings.run.record_folder is not None:
            # One folder a connection: a lost one leaves its recording as it is.
            folder = settings.run.record_folder / f"connection-{time.time_ns()}"
            channel = RecordingChannel(channel, folder)
        return channel

    return connect


def placed(settings: ConnectionSettings, place: str | None) -> ConnectionSettings:
    """The same link to another address; the server chose it, so it is checked as a setting is."""
    if place is None:
        return settings
    table = {**settings.model_dump(), "address": place}
    return parse_settings(ConnectionSettings, table, "the replica that the server named")
