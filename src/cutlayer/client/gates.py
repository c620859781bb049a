"""The gates of a run, as its settings want them; what passes them is decided in `privacy`."""

from cutlayer.client.accounts import check_gradients, keep_account
from cutlayer.client.hops import hop_views
from cutlayer.client.settings import ClientSettings
from cutlayer.client.step import Boundaries
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.hop_names import at_hop
from cutlayer.privacy.mechanism import PrivacySettings, Withhold
from cutlayer.privacy.run_privacy import RunPrivacy
from cutlayer.settings import parse_settings
from cutlayer.wire.codec import get_codec

__all__ = ["generation_gate", "hop_generation_gate", "hop_training_gates", "training_gates"]


def generation_gate(settings: ClientSettings, run: RunPrivacy) -> Boundary:
    """What generation releases goes through here; with hops, to the first one."""
    keep_account(settings, run)
    return hop_generation_gate(settings, run, hop=1)


def hop_generation_gate(view: ClientSettings, run: RunPrivacy, hop: int) -> Boundary:
    """The gate of a generation in front of one hop.

    Args:
        view: the settings as of a U over this hop alone.
        run: the run's secret and ledger.
        hop: its number, from 1.
    """
    return Boundary(
        at_hop(BoundaryName.GENERATION, hop),
        view.privacy.activation_rule(),
        get_codec(view.connection.codec),
        run.ledger,
        run.secret,
        view.privacy.generation.max_day_vectors,
        withholds=view.privacy.withhold is Withhold.PRIVATE,
    )


def training_gates(settings: ClientSettings, run: RunPrivacy) -> Boundaries:
    """What training releases at the lower and at the upper cut; with hops, to first and last."""
    views = hop_views(settings)
    for number, view in enumerate(views, start=1):
        check_gradients(view)
        # As of a U over this hop: a budget in epsilon wants a mechanism that has one.
        parse_settings(PrivacySettings, view.privacy.model_dump(), f"privacy of hop {number}")
    keep_account(settings, run)
    first = hop_training_gates(views[0], run, hop=1)
    last = hop_training_gates(views[-1], run, hop=len(views))
    return Boundaries(activations=first.activations, gradients=last.gradients)


def hop_training_gates(view: ClientSettings, run: RunPrivacy, hop: int) -> Boundaries:
    """What one hop is given in training: hidden states from below, gradients from above.

    Args:
        view: the settings as of a U over this hop alone.
        run: the run's secret and ledger.
        hop: its number, from 1.
    """
    codec, privacy = get_codec(view.connection.codec), view.privacy
    lower, upper = privacy.activation_rule(), privacy.gradient_rule()
    return Boundaries(
        activations=Boundary(
            at_hop(BoundaryName.ACTIVATIONS, hop),
            lower,
            codec,
            run.ledger,
            run.secret,
            withholds=privacy.withhold is Withhold.PRIVATE,
        ),
        gradients=Boundary(
            at_hop(BoundaryName.GRADIENTS, hop), upper, codec, run.ledger, run.secret
        ),
    )
