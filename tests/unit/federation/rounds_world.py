"""A federation without sockets, clock or models: toy members, a toy trunk, the real coordinator.

Members learn numbers that are seeded by their name and the round, so every sum can be recomputed.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.errors import CutlayerError, StepExpired, TransportError
from cutlayer.federation.chain import first_digest, payload_digest
from cutlayer.federation.coordinator import Answer, Coordinator
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.hidden import GroupKey, pad, seal_state
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.state import flatten, num_values, update_layout
from cutlayer.federation.store import FederationStore
from cutlayer.federation.strategy import STRATEGIES
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState, initial_state
from cutlayer.settings import parse_settings
from cutlayer.wire.federation_messages import (
    EnterRound,
    Join,
    PeerKeys,
    PeerSecrets,
    Round,
    SendUpdate,
    Unmasked,
    UpdateTaken,
)
from cutlayer.wire.header import Header
from cutlayer.wire.ring import words_of

__all__ = ["ENDS", "FINGERPRINT", "TRUNK", "ToyMember", "ToyTrunk", "World", "learnt", "weight_of"]

_PREFIX = "base_model.model.model.layers"
ENDS = {
    f"{_PREFIX}.0.q_proj.lora_A.weight": [2, 6],
    f"{_PREFIX}.0.q_proj.lora_B.weight": [5, 2],
    f"{_PREFIX}.3.q_proj.lora_A.weight": [2, 6],
    f"{_PREFIX}.3.q_proj.lora_B.weight": [5, 2],
}
TRUNK = {
    f"{_PREFIX}.1.q_proj.lora_A.weight": [2, 6],
    f"{_PREFIX}.1.q_proj.lora_B.weight": [5, 2],
}
FINGERPRINT = {"adapter": "lora r=2", "model": "abc", "cut": "1:3", "tokenizer": "t1"}


def learnt(name: str, round_number: int, layout: Mapping[str, Sequence[int]]) -> AdapterState:
    """What a member learns in a round."""
    seed = int.from_bytes(hashlib.sha256(f"{name}|{round_number}".encode()).digest()[:6], "big")
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.1 * torch.randn(*layout[key], generator=generator) for key in sorted(layout)}


def weight_of(name: str) -> int:
    """Scored tokens of a member in any round."""
    return 10 + sum(name.encode()) % 90


@dataclass
class ToyTrunk:
    """Every member's run learns what `learnt` says."""

    begun: dict[str, Mapping[str, AdapterState]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    poisoned: set[str] = field(default_factory=set)
    """Members whose trunk update is NaN."""
    is_down: bool = False

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        return TRUNK

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        self._fail_if_down()
        self.begun[run_id] = states

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        self._fail_if_down()
        return {name: self._update(run_id, name, kind) for name in members}

    def end_round(self, run_id: str) -> None:
        self.ended.append(run_id)

    def _update(self, run_id: str, name: str, kind: UpdateKind) -> TrunkUpdate:
        round_number = int(run_id.rpartition(".r")[2].partition(".")[0])
        change, start = learnt(name, round_number, TRUNK), self.begun[run_id][name]
        if name in self.poisoned:
            change = {key: value * float("nan") for key, value in change.items()}
        if kind is UpdateKind.GRADIENT:
            state = {key: value * weight_of(name) for key, value in change.items()}
        else:
            state = {key: start[key] + change[key] for key in start}
        return TrunkUpdate(state=state, weight=2 * weight_of(name))

    def _fail_if_down(self) -> None:
        if self.is_down:
            raise TransportError("replica 1 is gone")


@dataclass
class ToyMember:
    """One data owner: speaks the protocol, one call at a time, as `client.member` does."""

    name: str
    world: "World"
    fingerprint: dict[str, str] = field(default_factory=lambda: dict(FINGERPRINT))
    layout: dict[str, list[int]] = field(default_factory=lambda: dict(ENDS))
    group_key: GroupKey | None = None
    round: int = 0
    digest: str = ""
    needs_state: bool = True
    is_alive: bool = True
    is_finished: bool = False
    stops_before: Callable[[Header], bool] = lambda call: False
    """Calls that it never sends."""
    errors: list[CutlayerError] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    received: dict[str, Tensor] = field(default_factory=dict)
    first_received: dict[str, Tensor] = field(default_factory=dict)
    call: Header | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    secure: SecureMember | None = None

    def join(self) -> None:
        call = Join(federation="oncology", fingerprint=self.fingerprint, layout=self.layout)
        joined = self.world.coordinator.join(self.name, call, self.world.now_s)
        assert joined.member == self.name
        self.enter()

    def enter(self) -> None:
        self.secure = None
        self._next(
            EnterRound(
                federation="oncology",
                round=self.round,
                digest=self.digest,
                needs_state=self.needs_state,
            )
        )

    def restart(self) -> None:
        """SIGKILL and a new process: what was on disk is still known."""
        self.is_alive = True
        self.join()

    def poll(self) -> bool:
        """Send the call again, look for its answer; whether anything moved."""
        call = self.call
        if call is None or not self.is_alive or self.is_finished or self.stops_before(call):
            return False
        coordinator = self.world.coordinator
        try:
            coordinator.submit(self.name, call, self.tensors, self.world.now_s)
            answer = coordinator.answer(self.name, call)
        except StepExpired as error:
            self.errors.append(error)
            self.enter()
            return True
        except CutlayerError as error:
            self.errors.append(error)
            self.is_alive = False
            return True
        if answer is None:
            return False
        self._take(answer)
        return True

    def _take(self, answer: Answer) -> None:
        header = answer.header
        if isinstance(header, Round):
            self._begin(header, dict(answer.tensors))
        elif isinstance(header, PeerKeys):
            assert self.secure is not None
            self._next(self.secure.share_secrets(header))
        elif isinstance(header, PeerSecrets):
            assert self.secure is not None
            self.secure.take_secrets(header)
            self._send()
        elif isinstance(header, UpdateTaken) and header.is_secure:
            assert self.secure is not None
            self._next(self.secure.unmask(header))
        else:
            assert isinstance(header, UpdateTaken | Unmasked)
            self.enter()

    def _begin(self, begun: Round, tensors: dict[str, Tensor]) -> None:
        payload = {key: x for key, x in tensors.items() if key != "sealed"}
        assert payload_digest(payload) == begun.payload_digest
        self.rounds.append(begun)
        self.received, self.needs_state = tensors, False
        self.first_received = self.first_received or tensors
        self.round, self.digest = begun.round - 1, begun.digest
        self.is_finished = begun.is_finished
        if begun.is_finished:
            return
        if self.world.settings.secure.enabled:
            terms = Attempt(
                federation="oncology",
                round=begun.round,
                attempt=begun.attempt,
                cohort=tuple(begun.cohort),
                policy=self.world.settings.secure,
            )
            layout = self.world.update_layout
            self.secure = SecureMember(self.name, terms, num_values(layout))
            self._next(self.secure.share_keys())
        else:
            self._send()

    def _send(self) -> None:
        begun, layout = self.rounds[-1], self.world.update_layout
        update = learnt(self.name, begun.round, layout)
        header = SendUpdate(
            federation="oncology",
            round=begun.round,
            attempt=begun.attempt,
            weight=0 if self.secure else weight_of(self.name),
        )
        if self.secure is None:
            self._next(header, dict(update))
            return
        values_N, pad_M = flatten(update, layout), None
        if self.group_key is not None:
            count = len(values_N) + 1
            pad_M = pad(self.group_key, "oncology", begun.round, begun.attempt, self.name, count)
        masked = self.secure.mask(values_N, weight_of(self.name), pad_M)
        self._next(header, {"masked": masked, **self._sealed(begun)})

    def _sealed(self, begun: Round) -> dict[str, Tensor]:
        if self.group_key is None:
            return {}
        state = {"round": torch.tensor([float(begun.round - 1)])}
        sealed = seal_state(self.group_key, "oncology", begun.round, begun.digest, state)
        return {"sealed": words_of(sealed)}

    def _next(self, call: Header, tensors: dict[str, Tensor] | None = None) -> None:
        self.call, self.tensors = call, tensors or {}


class World:
    """A coordinator with its store and trunk, and members to talk to it."""

    def __init__(self, folder: Path, **table: object) -> None:
        defaults: dict[str, object] = {
            "name": "oncology",
            "rounds": 3,
            "adapter": {"rank": 2},
            "secure": {"enabled": False},
            "gather_s": 5.0,
            "phase_deadline_s": 60.0,
            "round_deadline_s": 600.0,
        }
        self.folder = folder
        self.settings = parse_settings(FederationSettings, defaults | table, "test")
        freezes_a = STRATEGIES.get(self.settings.strategy.kind).freezes_a
        self.update_layout = update_layout(ENDS, freezes_a)
        self.trunk = ToyTrunk()
        self.now_s = 1000.0
        self.members: dict[str, ToyMember] = {}
        self.open()

    def open(self) -> None:
        self.store = FederationStore(self.folder, "oncology")
        self.coordinator = Coordinator(self.settings, self.store, self.trunk, self.now_s)

    def restart(self) -> None:
        """The server process dies and a new one takes over."""
        self.store.close()
        self.trunk = ToyTrunk()
        self.now_s += 1.0
        self.open()

    def add(self, *names: str, **options: object) -> list[ToyMember]:
        added = [ToyMember(name, self, **options) for name in names]  # type: ignore[arg-type]
        for member in added:
            self.members[member.name] = member
            member.join()
        return added

    def pump(self, to_round: int | None = None) -> None:
        """Let everybody talk until nothing moves, or a round is finished."""
        version = -1
        while version != self.coordinator.version:
            version = self.coordinator.version
            for member in list(self.members.values()):
                while member.poll():
                    if to_round is not None and self.coordinator.status().round >= to_round:
                        return

    def advance(self) -> None:
        """When nothing moves any more, let the time of the next deadline come."""
        self.pump()
        self._pass_time()

    def _pass_time(self) -> None:
        deadline_s = self.coordinator.next_deadline_s()
        assert deadline_s is not None, "nothing is due, and nothing moves"
        self.now_s = max(self.now_s, deadline_s)
        self.coordinator.tick(self.now_s)

    def run_to(self, round_number: int, max_deadlines: int = 100) -> None:
        """Until a round is finished; deadlines pass when nothing else happens."""
        for _ in range(max_deadlines):
            self.pump(round_number)
            if self.coordinator.status().round >= round_number:
                return
            self._pass_time()
        raise AssertionError(f"round {round_number} is not finished")

    def coordinator_digest(self, round_number: int) -> str:
        """The chain's end at a round, computed from what is published."""
        if round_number:
            row = self.store.round_row(round_number)
            assert row is not None
            return row.digest
        return first_digest("oncology", payload_digest(initial_state(ENDS, 0)))

    def final(self) -> AdapterState:
        """Head, tail and trunk after the last finished round."""
        checkpoint = self.store.checkpoint()
        assert checkpoint is not None
        return checkpoint.state

    def expected(self, survivors: Sequence[Sequence[str]]) -> AdapterState:
        """fedavg over rounds with these survivors, as plainly as it can be written."""
        state = initial_state({**ENDS, **TRUNK}, 0)
        for number, names in enumerate(survivors, 1):
            total = sum(weight_of(name) for name in names)
            for layout in (self.update_layout, TRUNK):
                for key in layout:
                    parts = [weight_of(n) * learnt(n, number, layout)[key].double() for n in names]
                    state[key] = state[key] + (torch.stack(parts).sum(0) / total).float()
        return state
