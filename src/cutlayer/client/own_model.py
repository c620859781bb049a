"""What a client believes of the model, to be compared in the handshake. It does not connect."""

from collections.abc import Mapping

from cutlayer.client.remote_trunk import OwnModel
from cutlayer.client.settings import ClientSettings
from cutlayer.model.agreement import known_manifest
from cutlayer.model.folder import ModelFolder
from cutlayer.wire.spec import Spec

__all__ = ["own_model"]


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
