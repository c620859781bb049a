"""An owner's settings for a run that leaves nothing on this machine and nobody else takes part in.

It runs nothing: audits and probes do, with both sides in one process.
"""

from pathlib import Path

from cutlayer.client.recut_settings import RecutSettings
from cutlayer.client.settings import CheckSettings, ClientSettings, RunSettings
from cutlayer.wire.endpoints import ConnectionSettings

__all__ = ["on_this_machine"]


def on_this_machine(client: ClientSettings, model: Path) -> ClientSettings:
    """No address, no keys, no budgets; one trunk, and nobody who moves it on the way.

    Args:
        client: the owner's own.
        model: where the model's files are here.
    """
    codec = client.connection.codec
    noise = client.privacy.noise().model_dump()
    return client.model_copy(
        update={
            "model": client.model.model_copy(update={"path": str(model), "revision": None}),
            "connection": ConnectionSettings(address="127.0.0.1:1", plaintext=True, codec=codec),
            "privacy": type(client.privacy).model_validate(noise),
            "run": RunSettings(),
            "checks": CheckSettings(),
            "hops": (),
            "recut": RecutSettings(),
            "federation": None,
            "tee": None,
            "masked": None,
        }
    )
