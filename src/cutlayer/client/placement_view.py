"""A placement told to people: who runs which blocks, who sees what, and what protects it.

It reads settings alone: it connects to nobody and promises nothing beyond them.
"""

from dataclasses import dataclass

from cutlayer.client.hops import hop_views, placement_of
from cutlayer.client.settings import ClientSettings
from cutlayer.model.chain import Hop, PlaceKind, Placement
from cutlayer.model.partition import Part

__all__ = [
    "HopView",
    "far_hop",
    "own_hop",
    "told_certificate",
    "told_evidence",
    "told_placement",
]


@dataclass(frozen=True, kw_only=True)
class HopView:
    """One place, as its owner should know it."""

    hop: Hop
    address: str | None = None
    """Where it is; None is here."""
    certificate: str
    """Who vouches for it."""
    evidence: str
    """What it must prove."""
    activations: str
    """Rule for the hidden states that it is given, and what the rule promises."""
    gradients: str
    """Rule for the gradients that it is given."""
    sees: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "place": str(self.hop.place),
            "blocks": [self.hop.blocks.start, self.hop.blocks.stop],
            "address": self.address,
            "certificate": self.certificate,
            "evidence": self.evidence,
            "activations": self.activations,
            "gradients": self.gradients,
            "sees": list(self.sees),
        }


_AT_HOME = (
    "texts, tokens and labels",
    "losses and every token of a reply",
    "the adapters of its own blocks",
)
"""What the owner's own places see."""


def told_placement(
    settings: ClientSettings, num_blocks: int
) -> tuple[Placement, tuple[HopView, ...]]:
    """The placement of these settings, and each of its places.

    Args:
        settings: of the owner.
        num_blocks: of the whole model.

    Raises:
        ConfigError: the places do not cover the model, or a hop is wrong.
    """
    placement = placement_of(settings, num_blocks)
    views = hop_views(settings)
    far = [far_hop(hop, view) for hop, view in zip(placement.trunks, views, strict=True)]
    first, last = (own_hop(hop) for hop in (placement.hops[0], placement.hops[-1]))
    return placement, (first, *far, last)


def own_hop(hop: Hop) -> HopView:
    """The owner's own machine."""
    return HopView(
        hop=hop,
        certificate="own machine",
        evidence="own machine",
        activations="nothing leaves",
        gradients="nothing leaves",
        sees=_AT_HOME,
    )


def far_hop(hop: Hop, view: ClientSettings, is_frozen: bool = False) -> HopView:
    """A trunk server.

    Args:
        hop: place and blocks.
        view: the settings as of a U over it.
        is_frozen: it takes part in no step: no gradients or norms reach it.
    """
    privacy = view.privacy
    lower, upper = privacy.activation_rule(), privacy.gradient_rule()
    return HopView(
        hop=hop,
        address=view.connection.address,
        certificate=told_certificate(view),
        evidence=told_evidence(view),
        activations=f"{lower.label} ({lower.guarantee})",
        gradients="none leave" if is_frozen else f"{upper.label} ({upper.guarantee})",
        sees=_sights(hop, view, is_frozen),
    )


def told_certificate(view: ClientSettings) -> str:
    """Who vouches for the place at `[connection]`."""
    connection = view.connection
    if connection.tls is None:
        return "none: plaintext on this machine"
    name = connection.server_name or connection.address.rpartition(":")[0]
    return f"{name}, role serve, signed by {connection.tls.authority}"


def told_evidence(view: ClientSettings) -> str:
    """What it must prove."""
    if view.tee is None:
        return "none asked"
    asked = "required" if view.tee.required else "accepted, not required"
    return f"{asked}, by policy {view.tee.policy}"


def _sights(hop: Hop, view: ClientSettings, is_frozen: bool) -> tuple[str, ...]:
    before = f"hidden states before block {hop.blocks.start}, after the noise above"
    after = f"after block {hop.blocks.stop - 1}"
    seen = [f"{before}, and {after}", "lengths of rows, times and numbers of calls"]
    if hop.place is PlaceKind.MEMBER:
        seen.append("as a member: whatever it knows of the common task besides")
    if is_frozen:
        return tuple(seen)
    parts = view.adapter.parts
    if parts != [Part.TAIL]:
        seen.append(f"gradients {after}, through which labels leak, after the noise above")
    if Part.TRUNK in parts:
        seen.append("the adapters of its own blocks")
    if view.train is not None and view.train.clip_norm is not None:
        seen.append("the gradient norm of all other places together, which no noise covers")
    return tuple(seen)
