"""A client's settings as each hop of its trunk needs them: those of a U over that hop alone.

It does not connect (`chain_setup`) nor check the hops (`hop_settings`, `model.chain`).
"""

from collections.abc import Sequence

from cutlayer.client.hop_settings import HopSettings
from cutlayer.client.settings import ClientSettings
from cutlayer.client.tee_settings import ClientTeeSettings
from cutlayer.model.chain import Placement
from cutlayer.privacy.mechanism import NoiseSettings, PrivacySettings
from cutlayer.settings import settings_digest
from cutlayer.wire.endpoints import ConnectionSettings

__all__ = [
    "NO_HOPS",
    "chain_identity",
    "hop_view",
    "hop_views",
    "identity_of",
    "placement_of",
    "told_guarantee",
]

NO_HOPS = {"hops": "none", "hops' privacy": "none"}
"""A run of one trunk server is not continued over several."""


def placement_of(settings: ClientSettings, num_blocks: int) -> Placement:
    """Where the blocks of these settings execute.

    Args:
        settings: of the owner; without hops they describe the U.
        num_blocks: of the whole model.

    Raises:
        ConfigError: the places do not cover the model.
    """
    if not settings.hops:
        return Placement.u_shaped(settings.model.lower, settings.model.upper, num_blocks)
    return Placement.around([hop.hop for hop in settings.hops], num_blocks)


def hop_views(settings: ClientSettings) -> tuple[ClientSettings, ...]:
    """Per hop the settings of a U over it; the settings themselves where there are no hops."""
    first, *later = settings.hops or (None,)
    if first is None:
        return (settings,)
    blocks = {"lower": first.lower, "upper": first.upper}
    model = settings.model.model_copy(update=blocks)
    view = settings.model_copy(update={"model": model, "hops": ()})
    return (view, *(hop_view(settings, hop) for hop in later if hop is not None))


def told_guarantee(settings: ClientSettings) -> str:
    """What the noise on activations promises, hop by hop where they differ."""
    promises = [view.privacy.activation_rule().guarantee for view in hop_views(settings)]
    if len(set(promises)) == 1:
        return promises[0]
    return "; ".join(f"hop {number}: {text}" for number, text in enumerate(promises, start=1))


def chain_identity(settings: ClientSettings) -> dict[str, str]:
    """What of the hops must stay the same for a run to be continued, by name."""
    return identity_of(settings.hops, hop_views(settings)[1:]) or NO_HOPS


def identity_of(hops: Sequence[HopSettings], views: Sequence[ClientSettings]) -> dict[str, str]:
    """As `chain_identity`; empty where there are no hops.

    Args:
        hops: all of them.
        views: of those with a privacy of their own.
    """
    if not hops:
        return {}
    places = ",".join(f"{hop.place}:{hop.lower}:{hop.upper}" for hop in hops)
    noise = ",".join(settings_digest(view.privacy.noise()) for view in views)
    return {"hops": places, "hops' privacy": noise}


def hop_view(settings: ClientSettings, hop: HopSettings) -> ClientSettings:
    """The settings of a U over one hop that says itself where it is.

    Args:
        settings: of the owner.
        hop: with a connection and privacy of its own.
    """
    # `check_hops` has refused later hops without them.
    assert hop.privacy is not None
    model = settings.model.model_copy(update={"lower": hop.lower, "upper": hop.upper})
    return settings.model_copy(
        update={
            "model": model,
            "connection": _connection(settings.connection, hop),
            "tee": _tee(settings.tee, hop),
            "privacy": _privacy(settings.privacy, hop.privacy.noise()),
            "hops": (),
        }
    )


def _connection(first: ConnectionSettings, hop: HopSettings) -> ConnectionSettings:
    assert hop.connection is not None
    own = hop.connection
    changes = {"address": own.address, "server_name": own.server_name, "codec": own.codec}
    files = {} if own.tls is None else {"tls": own.tls}
    return first.model_copy(update={**changes, **files})


def _tee(first: ClientTeeSettings | None, hop: HopSettings) -> ClientTeeSettings | None:
    if hop.tee is None:
        return None
    return ClientTeeSettings(
        **hop.tee.model_dump(),
        attester=None if first is None else first.attester,
        adapter_key_file=None if first is None else first.adapter_key_file,
    )


def _privacy(first: PrivacySettings, noise: NoiseSettings) -> PrivacySettings:
    """The hop's noise, under the owner's budgets; what is withheld never comes this far."""
    return first.model_copy(
        update={name: getattr(noise, name) for name in type(noise).model_fields}
    )
