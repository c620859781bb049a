"""From settings to the trunk as a client uses it: one server, or a chain of hops.

It does not connect yet (`link`) nor decide what may leave (`gates`).
"""

from collections.abc import Callable, Mapping, Sequence

from cutlayer.client.attested import attestation_of, note_in
from cutlayer.client.chain_calls import ChainHop
from cutlayer.client.chain_trunk import ChainTrunk
from cutlayer.client.checked_trunk import checked_trunk
from cutlayer.client.gates import hop_generation_gate, hop_training_gates
from cutlayer.client.hops import hop_views
from cutlayer.client.link import Link
from cutlayer.client.own_model import opener, own_model
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Part
from cutlayer.wire.channel import Channel

__all__ = ["hops_of", "trunk_of"]


def trunk_of(
    first: Link,
    settings: ClientSettings,
    folder: ModelFolder,
    state: RunState,
    leaves: Mapping[str, str],
    connects: Sequence[Callable[[], Channel]] | None = None,
) -> RemoteTrunk:
    """The trunk of these settings.

    Args:
        first: the link to the first hop, which is the only one of a U.
        settings: of the owner.
        folder: the model.
        state: the run.
        leaves: manifest leaves of head and tail.
        connects: open channels to the later hops in place of gRPC.

    Raises:
        ConfigError: settings of a hop that exclude each other.
        ModelError: the model folder does not have weights that are to be checked.
    """
    views = hop_views(settings)
    trunk = checked_trunk(first, views[0], folder, state)
    if len(views) == 1:
        return trunk
    trunk.checks.peer = f"hop 1 ({views[0].connection.address})"
    own = ChainHop(
        trunk=trunk,
        training=hop_training_gates(views[0], state.privacy, 1),
        generation=hop_generation_gate(views[0], state.privacy, 1),
    )
    later = hops_of(views[1:], folder, state, leaves, connects, first_number=2)
    return ChainTrunk([own, *later], Part.TRUNK in settings.adapter.parts)


def hops_of(
    views: Sequence[ClientSettings],
    folder: ModelFolder,
    state: RunState,
    leaves: Mapping[str, str],
    connects: Sequence[Callable[[], Channel]] | None,
    first_number: int,
) -> list[ChainHop]:
    """Hops that say themselves where they are.

    Args:
        views: per hop the settings of a U over it alone.
        folder: the model.
        state: the run.
        leaves: manifest leaves of the owner's parts.
        connects: open channels in place of gRPC.
        first_number: of the first of them in the chain, from 1.

    Raises:
        ConfigError: another number of channels than hops, or settings that exclude each other.
    """
    opens: Sequence[Callable[[], Channel] | None] = connects or [None] * len(views)
    if len(opens) != len(views):
        raise ConfigError(f"{len(opens)} channels for {len(views)} hops; give one for each")
    hops = []
    for number, (view, connect) in enumerate(zip(views, opens, strict=True), start=first_number):
        proof = attestation_of(view)
        note_in(state, proof)
        link = Link(opener(view, proof, connect), own_model(view, folder, leaves))
        trunk = checked_trunk(link, view, folder, state)
        trunk.checks.peer = f"hop {number} ({view.connection.address})"
        hops.append(
            ChainHop(
                trunk=trunk,
                training=hop_training_gates(view, state.privacy, number),
                generation=hop_generation_gate(view, state.privacy, number),
                proof=proof,
            )
        )
    return hops
