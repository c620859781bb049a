"""The gates of a run, as its settings want them; what passes them is decided in `privacy`."""

from cutlayer.client.accounts import check_gradients, keep_account
from cutlayer.client.settings import ClientSettings
from cutlayer.client.step import Boundaries
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.mechanism import Withhold
from cutlayer.privacy.run_privacy import RunPrivacy
from cutlayer.wire.codec import get_codec

__all__ = ["generation_gate", "training_gates"]


def generation_gate(settings: ClientSettings, run: RunPrivacy) -> Boundary:
    """What generation releases goes through here."""
    keep_account(settings, run)
    return Boundary(
        BoundaryName.GENERATION,
        settings.privacy.activation_rule(),
        get_codec(settings.connection.codec),
        run.ledger,
        run.secret,
        settings.privacy.generation.max_day_vectors,
        withholds=settings.privacy.withhold is Withhold.PRIVATE,
    )


def training_gates(settings: ClientSettings, run: RunPrivacy) -> Boundaries:
    """What training releases at the lower and at the upper cut."""
    check_gradients(settings)
    keep_account(settings, run)
    codec, privacy = get_codec(settings.connection.codec), settings.privacy
    lower, upper = privacy.activation_rule(), privacy.gradient_rule()
    return Boundaries(
        activations=Boundary(
            BoundaryName.ACTIVATIONS,
            lower,
            codec,
            run.ledger,
            run.secret,
            withholds=privacy.withhold is Withhold.PRIVATE,
        ),
        gradients=Boundary(BoundaryName.GRADIENTS, upper, codec, run.ledger, run.secret),
    )
