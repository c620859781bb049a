"""A placement whose last blocks are at another place, told to people; it connects to nobody."""

from cutlayer.client.placement_view import (
    HopView,
    far_hop,
    own_hop,
    told_certificate,
    told_evidence,
)
from cutlayer.client.settings import ClientSettings
from cutlayer.enclave.owner_settings import EnclaveClientSettings, LabelPlace
from cutlayer.model.chain import Hop, Placement

__all__ = ["told_enclave_placement"]

_LABELS = {
    LabelPlace.CLIENT: "gradients at the logits, in which its software could read every label",
    LabelPlace.ENCLAVE: "labels and losses, inside what it proves",
    LabelPlace.SERVER: "LABELS, losses and the distribution of the text: it proves nothing",
}


def told_enclave_placement(
    settings: EnclaveClientSettings, num_blocks: int
) -> tuple[Placement, tuple[HopView, ...]]:
    """The placement of these settings, and each of its places.

    Args:
        settings: of the owner.
        num_blocks: of the whole model.

    Raises:
        ConfigError: the places do not cover the model, or a hop is wrong.
    """
    placement = settings.placement(num_blocks)
    views = settings.hop_views(num_blocks)
    middle = [
        far_hop(hop, view, is_frozen=True)
        for hop, view in zip(placement.trunks, views, strict=True)
    ]
    last = _last(placement.hops[-1], settings, settings.as_client(num_blocks))
    return placement, (own_hop(placement.hops[0]), *middle, last)


def _last(hop: Hop, settings: EnclaveClientSettings, view: ClientSettings) -> HopView:
    return HopView(
        hop=hop,
        address=view.connection.address,
        certificate=told_certificate(view),
        evidence=told_evidence(view),
        activations="none (no noise: none)",
        gradients="none (no noise: none)",
        sees=(
            f"hidden states before block {hop.blocks.start}, without noise",
            "logits of replies, and which places of a row are scored",
            _LABELS[settings.labels],
            "all adapters and their optimizer",
            *_unproved(settings),
        ),
    )


def _unproved(settings: EnclaveClientSettings) -> tuple[str, ...]:
    if settings.tee.required or settings.labels is LabelPlace.SERVER:
        return ()
    return ("all of this WITHOUT PROOF of what it runs: tee.required is false",)
