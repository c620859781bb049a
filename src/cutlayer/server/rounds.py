"""The trunk's side of a federation's rounds: start states, and members' adapters to train them in.

It does not choose members, aggregate (`federation`) or train (`runs`), and writes nothing to disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cutlayer.errors import ConfigError, ProtocolError, StepExpired
from cutlayer.federation.cuts import block_of
from cutlayer.model.adapters import Adapter, AdapterSettings, AdapterState, attach, layout_of
from cutlayer.model.partition import Trunk
from cutlayer.wire.messages import OpenRun

__all__ = ["RoundTable", "TrainedBlocks"]


@dataclass(frozen=True, kw_only=True)
class _Round:
    settings: AdapterSettings
    layout: Mapping[str, Sequence[int]]
    """Of the adapter on all blocks of the trunk; to find it may take a walk over all weights."""
    states: dict[str, AdapterState]


@dataclass(frozen=True, kw_only=True)
class TrainedBlocks:
    """What a member trains of the trunk."""

    settings: AdapterSettings
    blocks: range
    """Global indices: those of the member's cut."""


@dataclass(kw_only=True)
class _Slot:
    """One member's adapter on the trunk; putting one on is slow, so it serves many rounds."""

    adapter: Adapter
    trained: TrainedBlocks
    run_id: str
    used_s: float


class RoundTable:
    """Open rounds, and one adapter per member and federation."""

    def __init__(self, trunk: Trunk, new_name: Callable[[], str]) -> None:
        """Args:
        trunk: where adapters are put.
        new_name: gives each adapter its own name.
        """
        self._trunk = trunk
        self._new_name = new_name
        self._rounds: dict[str, _Round] = {}
        self._slots: dict[tuple[str, str], _Slot] = {}

    def begin(
        self, run_id: str, settings: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """Keep the weights that members' runs start from; called again, it adds members.

        A member's weights are those of the blocks that its cut leaves to the trunk.

        Raises:
            ConfigError: the round is known with other adapter settings.
            ProtocolError: a state does not fit the trunk.
        """
        known = self._rounds.get(run_id)
        if known is None:
            known = _Round(settings=settings, layout=layout_of(self._trunk, settings), states={})
        if known.settings != settings:
            raise ConfigError(f"round {run_id} has begun with other adapter settings")
        shapes = {(key, tuple(shape)) for key, shape in known.layout.items()}
        for member, state in states.items():
            if not {(k, tuple(v.shape)) for k, v in state.items()} <= shapes:
                raise ProtocolError(
                    f"round {run_id}: the start state of {member} does not fit this trunk's "
                    "blocks and adapter settings"
                )
        self._rounds[run_id] = known
        known.states.update(states)

    def end(self, run_id: str) -> None:
        """Forget a round's start states; adapters stay for the members' next round."""
        self._rounds.pop(run_id, None)

    def adapter_for(
        self, owner: str, opened: OpenRun, trained: TrainedBlocks, now_s: float
    ) -> tuple[Adapter, str | None]:
        """The member's adapter at the round's start, and which run of the member lost it.

        Raises:
            StepExpired: the round has not begun, is over, or is not this member's.
            ConfigError: the round has other adapter settings.
            ProtocolError: the round is another federation's, or was begun for another cut.
        """
        # Or a member could have an adapter made for every name that it thinks up.
        if opened.run_id.rpartition(".r")[0] != opened.federation:
            raise ProtocolError(f"{opened.run_id} is no round of federation {opened.federation}")
        known = self._rounds.get(opened.run_id)
        if known is None or owner not in known.states:
            raise StepExpired(
                f"round {opened.run_id} is not open for {owner}; enter the federation's next round"
            )
        settings, start = trained.settings, known.states[owner]
        if settings != known.settings:
            raise ConfigError(
                f"round {opened.run_id} trains {known.settings.model_dump(mode='json')}, this "
                f"client {settings.model_dump(mode='json')}; take the federation's settings"
            )
        if {key for key in known.layout if block_of(key) in trained.blocks} != start.keys():
            raise ProtocolError(
                f"round {opened.run_id} was begun for {owner} with other blocks than "
                f"{trained.blocks.start}:{trained.blocks.stop}; join again with the new cut"
            )
        slot, before = self._slot(owner, opened, trained, now_s)
        slot.adapter.load(start)
        for parameter in slot.adapter.parameters():
            parameter.grad = None
        return slot.adapter, before

    def drop_idle(self, used_before_s: float) -> None:
        """Take adapters off the trunk whose members have not trained since."""
        open_runs = self._rounds.keys()
        for key, slot in list(self._slots.items()):
            if slot.used_s < used_before_s and slot.run_id not in open_runs:
                self._slots.pop(key).adapter.remove()

    def _slot(
        self, owner: str, opened: OpenRun, trained: TrainedBlocks, now_s: float
    ) -> tuple[_Slot, str | None]:
        assert opened.federation is not None
        key = (owner, opened.federation)
        slot = self._slots.get(key)
        before = None if slot is None else slot.run_id
        if slot is not None and slot.trained != trained:
            self._slots.pop(key).adapter.remove()
            slot = None
        if slot is None:
            adapter = attach(self._trunk, trained.settings, self._new_name(), trained.blocks)
            slot = _Slot(adapter=adapter, trained=trained, run_id=opened.run_id, used_s=now_s)
            self._slots[key] = slot
        slot.run_id, slot.used_s = opened.run_id, now_s
        return slot, before if before != opened.run_id else None
