"""The far trunk with the checks that an owner's settings want; it checks nothing itself."""

from collections.abc import Callable

from cutlayer.client.link import Link
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.returned import ReturnChecks
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import ClientSettings, TrainSettings
from cutlayer.client.spot_check import CheckedModel, PublicTrunk
from cutlayer.errors import ConfigError, PeerMisbehaved
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Cut
from cutlayer.storage.audit_log import AuditEntry, AuditEvent

__all__ = ["checked_trunk"]


def checked_trunk(
    link: Link, settings: ClientSettings, folder: ModelFolder, state: RunState
) -> RemoteTrunk:
    """The trunk behind a link; its weights are loaded here too where calls are recomputed.

    Raises:
        ConfigError: training that cannot be recomputed.
        ModelError: the model folder does not have the trunk's weights.
    """
    note = _noted_in(state)

    def stop(step: int) -> None:
        # What is open must not be repeated, and rows are not given back: not a byte more.
        link.close()
        note(step)

    return RemoteTrunk(link, ReturnChecks(settings.checks, _public_trunk(settings, folder), stop))


def _public_trunk(settings: ClientSettings, folder: ModelFolder) -> PublicTrunk | None:
    if settings.checks.spot_check_every is None:
        return None
    if settings.federation is not None:
        raise ConfigError(
            "checks.spot_check_every does not work in a federation: the trunk adapter of a round "
            "cannot be asked for; remove it"
        )
    model = settings.model
    return PublicTrunk(
        CheckedModel(
            folder=folder,
            cut=Cut(model.lower, model.upper),
            dtype=model.dtype,
            device=model.device,
            weights=model.trunk_weights,
            codec=settings.connection.codec,
            adapter=settings.adapter,
            optimizer=(settings.train or TrainSettings(steps=1)).optimizer,
        )
    )


def _noted_in(state: RunState) -> Callable[[int], None]:
    """Writes a fault to the audit log of a run, on disk at once."""

    def note(step: int) -> None:
        state.audit.record(
            AuditEntry(
                event=AuditEvent.REFUSED,
                who="server",
                run=state.run_id,
                step=step,
                error=PeerMisbehaved.__name__,
            )
        )
        state.audit.flush()

    return note
