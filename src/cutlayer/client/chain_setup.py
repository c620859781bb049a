"""From settings to the trunk as a client uses it: one server, or a chain of hops.

It does not connect yet (`link`) nor decide what may leave (`gates`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

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
from cutlayer.wire.messages import Welcome

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
    apart = _Apart()
    _name(1, first, trunk, views[0], apart)
    own = ChainHop(
        trunk=trunk,
        training=hop_training_gates(views[0], state.privacy, 1),
        generation=hop_generation_gate(views[0], state.privacy, 1),
    )
    later = hops_of(views[1:], folder, state, leaves, connects, first_number=2, apart=apart)
    return ChainTrunk([own, *later], Part.TRUNK in settings.adapter.parts)


def hops_of(
    views: Sequence[ClientSettings],
    folder: ModelFolder,
    state: RunState,
    leaves: Mapping[str, str],
    connects: Sequence[Callable[[], Channel]] | None,
    first_number: int,
    apart: "_Apart | None" = None,
) -> list[ChainHop]:
    """Hops that say themselves where they are.

    Args:
        views: per hop the settings of a U over it alone.
        folder: the model.
        state: the run.
        leaves: manifest leaves of the owner's parts.
        connects: open channels in place of gRPC.
        first_number: of the first of them in the chain, from 1.
        apart: knows the processes of hops before these.

    Raises:
        ConfigError: another number of channels than hops, or settings that exclude each other.
    """
    opens: Sequence[Callable[[], Channel] | None] = connects or [None] * len(views)
    if len(opens) != len(views):
        raise ConfigError(f"{len(opens)} channels for {len(views)} hops; give one for each")
    hops, apart = list[ChainHop](), apart or _Apart()
    for number, (view, connect) in enumerate(zip(views, opens, strict=True), start=first_number):
        proof = attestation_of(view)
        note_in(state, proof)
        link = Link(opener(view, proof, connect), own_model(view, folder, leaves))
        trunk = checked_trunk(link, view, folder, state)
        _name(number, link, trunk, view, apart)
        hops.append(
            ChainHop(
                trunk=trunk,
                training=hop_training_gates(view, state.privacy, number),
                generation=hop_generation_gate(view, state.privacy, number),
                max_session_vectors=view.privacy.generation.max_session_vectors,
                proof=proof,
            )
        )
    return hops


class _Apart:
    """Which process answers for each hop: one that has two of them would see both of its sides."""

    def __init__(self) -> None:
        self._boot_ids: dict[int, str] = {}

    def note(self, number: int, welcome: Welcome) -> None:
        """Take what a hop said in the handshake.

        Raises:
            ConfigError: the same process is another hop too.
        """
        for other, boot_id in self._boot_ids.items():
            if other != number and boot_id == welcome.boot_id:
                raise ConfigError(
                    f"hops {min(other, number)} and {max(other, number)} are one server, which "
                    "would see what both are given: give it all of these blocks as one hop"
                )
        self._boot_ids[number] = welcome.boot_id


def _name(number: int, link: Link, trunk: RemoteTrunk, view: ClientSettings, apart: _Apart) -> None:
    link.peer = trunk.checks.peer = f"hop {number} ({view.connection.address})"
    link.on_welcome = partial(apart.note, number)
