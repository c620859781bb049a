"""The toy federation of `rounds_world`, whose members are cut in different places.

The server holds blocks 1 to 4 of six; blocks 0 and 5 are at everybody's client.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cutlayer.federation.cuts import Cuts, Greeting, client_part, cut_text, fill, read_cuts
from cutlayer.federation.cuts import vector_layout as layout_of_vectors
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.state import flatten, num_values
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState, initial_state
from cutlayer.model.cut import Cut
from cutlayer.wire.federation_messages import Join, SendUpdate
from tests.unit.federation.rounds_world import (
    FINGERPRINT,
    ToyMember,
    ToyTrunk,
    World,
    learnt,
    weight_of,
)

__all__ = ["CUTS", "SERVED", "WHOLE", "CutMember", "CutTrunk", "CutWorld", "greeting", "joining"]

SERVED = Cut(1, 5)
CUTS = {"a": Cut(1, 5), "b": Cut(2, 5), "c": Cut(2, 4), "d": Cut(3, 4)}
_KEY = "base_model.model.model.layers.{}.q_proj.lora_{}.weight"
WHOLE = {
    _KEY.format(block, factor): shape
    for block in range(6)
    for factor, shape in (("A", [2, 6]), ("B", [5, 2]))
}
AT_SERVER = {key: shape for key, shape in WHOLE.items() if int(key.split(".")[4]) in SERVED.trunk}


def greeting(cut: Cut, root: str = "root") -> Greeting:
    """Of a member's connection."""
    return Greeting(cut=cut, served=SERVED, root=root)


def joining(cut: Cut, **fingerprint: str) -> Join:
    """JOIN of a member of this cut."""
    told = {**FINGERPRINT, "cut": cut_text(cut), "weights": f"of {cut_text(cut)}", **fingerprint}
    return Join(federation="oncology", fingerprint=told, layout=client_part(WHOLE, cut))


class CutTrunk(ToyTrunk):
    """Every member's run learns what it was begun with."""

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        return AT_SERVER

    def _update(self, run_id: str, name: str, kind: UpdateKind) -> TrunkUpdate:
        round_number = int(run_id.rpartition(".r")[2].partition(".")[0])
        change, start = learnt(name, round_number, WHOLE), self.begun[run_id][name]
        is_gradient = kind is UpdateKind.GRADIENT
        state = {
            key: change[key] * weight_of(name) if is_gradient else start[key] + change[key]
            for key in start
        }
        return TrunkUpdate(state=state, weight=weight_of(name))


class CutMember(ToyMember):
    """A member with a cut of its own."""

    cut: Cut = SERVED

    def join(self) -> None:
        coordinator, now_s = self.world.coordinator, self.world.now_s
        coordinator.join(self.name, joining(self.cut), now_s, greeting(self.cut))
        self.enter()

    def _cuts(self) -> Cuts:
        begun = self.rounds[-1]
        assert sorted(begun.cuts) == begun.cohort
        return read_cuts(begun.cuts)

    def _begin(self, begun, tensors) -> None:  # type: ignore[no-untyped-def]
        settings = self.world.settings
        super()._begin(begun, tensors)
        if begun.is_finished or not settings.secure.enabled:
            return
        terms = Attempt(
            federation="oncology",
            round=begun.round,
            attempt=begun.attempt,
            cohort=tuple(begun.cohort),
            policy=settings.secure,
            cuts=self._cuts(),
            vector=layout_of_vectors(WHOLE, self._cuts()),
        )
        self.secure = SecureMember(self.name, terms, num_values(terms.vector))
        self._next(self.secure.share_keys())

    def _send(self) -> None:
        begun, cuts = self.rounds[-1], self._cuts()
        change = learnt(self.name, begun.round, WHOLE)
        update = {key: change[key] for key in client_part(WHOLE, self.cut)}
        header = SendUpdate(
            federation="oncology",
            round=begun.round,
            attempt=begun.attempt,
            weight=0 if self.secure else weight_of(self.name),
        )
        if self.secure is None:
            self._next(header, update)
            return
        layout = layout_of_vectors(WHOLE, cuts)
        values_N = flatten(fill(update, layout, self.cut), layout)
        self._next(header, {"masked": self.secure.mask(values_N, weight_of(self.name))})


class CutWorld(World):
    """A coordinator whose members choose their cuts."""

    def __init__(self, folder: Path, **table: object) -> None:
        super().__init__(folder, **{"mixed_cuts": True, **table})

    def open(self) -> None:
        self.trunk = CutTrunk()
        super().open()

    def enter(self, *names: str, cuts: Cuts = CUTS) -> list[CutMember]:
        """Members of these names and cuts join."""
        for name in names:
            member = CutMember(name, self)
            member.cut = cuts[name]
            self.members[name] = member
            member.join()
        return [self.members[name] for name in names]  # type: ignore[misc]

    def plain_mean(self, survivors: Sequence[Sequence[str]]) -> AdapterState:
        """fedavg over rounds with these survivors, wherever each trained a key."""
        state = initial_state(WHOLE, 0)
        for number, names in enumerate(survivors, 1):
            total = sum(weight_of(name) for name in names)
            for key in WHOLE:
                parts = [weight_of(n) * learnt(n, number, WHOLE)[key].double() for n in names]
                state[key] = state[key] + (torch.stack(parts).sum(0) / total).float()
        return state
