"""From settings to masked parts: connects to the workers, checks that they are two, and masks.

It computes nothing. Server and client call it once, where they have loaded their parts.
"""

from cutlayer.model.partition import PartModule
from cutlayer.tee.masked.linear import MaskedPlace
from cutlayer.tee.masked.offload import PadSource
from cutlayer.tee.masked.pads import Seeds
from cutlayer.tee.masked.part import mask_part
from cutlayer.tee.masked.remote import (
    RemoteAccelerator,
    RemoteDealing,
    WorkerLink,
    check_apart,
)
from cutlayer.tee.masked.settings import MaskedSettings, PadSourceKind
from cutlayer.tee.masked.sources import Dealer, Pool, PoolLimits

__all__ = ["mask_parts", "release_parts"]

_ATTRIBUTE = "cutlayer_masked_place"


def mask_parts(settings: MaskedSettings | None, *parts: PartModule) -> None:
    """Mask the parts if the settings say so; `release_parts` lets the workers go.

    Raises:
        ConfigError: dealer and accelerator are one, or a worker is of another kind.
        ModelError: a part cannot be masked.
        TransportError: a worker does not answer.
        ProtocolError: it is no worker, or not the dealer of this key.
    """
    if settings is None:
        return
    seeds = Seeds()
    accelerator = WorkerLink(settings.accelerator, "accelerator", settings.timeout_s, seeds=seeds)
    try:
        pads = _pads(settings, seeds, accelerator)
    except BaseException:
        accelerator.close()
        raise
    place = MaskedPlace(RemoteAccelerator(accelerator), pads)
    try:
        for part in parts:
            mask_part(part, place, settings)
            vars(part)[_ATTRIBUTE] = place
    except BaseException:
        place.close()
        raise
    if isinstance(place.pads, Pool):
        place.pads.start()


def release_parts(*parts: PartModule) -> None:
    """Close what masked parts work with; others have nothing to close."""
    for part in parts:
        place = vars(part).pop(_ATTRIBUTE, None)
        if place is not None:
            place.close()


def _pads(settings: MaskedSettings, seeds: Seeds, accelerator: WorkerLink) -> PadSource:
    if settings.source is PadSourceKind.PRECOMPUTE:
        waits = settings.when_exhausted == "wait"
        return Pool(PoolLimits(num_tokens=settings.pool_tokens, waits=waits), seeds)
    assert settings.dealer is not None
    dealer = WorkerLink(
        settings.dealer, "dealer", settings.timeout_s, dealer_key=settings.dealer_key, seeds=seeds
    )
    try:
        check_apart(accelerator.hello(), dealer.hello(), settings.allow_same_machine)
    except BaseException:
        dealer.close()
        raise
    return Dealer(RemoteDealing(dealer), seeds)
