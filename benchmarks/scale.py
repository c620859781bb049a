"""Coordinator, secure aggregation and scheduler with up to a thousand clients, under a fake clock.

`python -m benchmarks.scale --json --clients 1000`. Every frame is encoded and counted; nothing is
sent or trained. Some members vanish before their update, and each sum is compared with the plain
mean.

Bytes of a client in a round have three parts: the update (SEND_UPDATE up, ROUND down: the adapters,
constant), the cohort's names in ROUND (every member must know whom the graph is drawn over), and
the protocol (keys, shares, and all else).
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.report import Value, emit, median, parse_arguments, print_table
from cutlayer.federation.coordinator import Coordinator
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.settings import FederationSettings, SecureSettings
from cutlayer.federation.store import FederationStore
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState, initial_state
from cutlayer.server.scheduler import BatchScheduler, Waiting, WorkKind
from cutlayer.server.settings import BatchSettings
from cutlayer.wire.codec import encode
from cutlayer.wire.federation_messages import (
    EnterRound,
    Join,
    PeerKeys,
    PeerSecrets,
    Round,
    SendUpdate,
    UpdateTaken,
)
from cutlayer.wire.frame import Frame, frame_bytes
from cutlayer.wire.header import Header
from cutlayer.wire.messages import HEADERS
from cutlayer.wire.ring import pack_ring

__all__ = ["Point", "main", "measure_round", "measure_scheduler"]

LAYOUT = {"layers.0.q_proj.lora_A.weight": [8, 125], "layers.0.q_proj.lora_B.weight": [125, 8]}
"""2,000 values."""
STANDARD, SMOKE = (10, 30, 100, 300, 1000), (4, 8, 16)
COMPLETE = 34
"""Up to here the graph is complete, so a member's partners grow with the cohort."""
_VANISHING = 25
"""Every so many-th member vanishes before its update."""
H = TypeVar("H", bound=Header)
_KIND_OF = {header: kind for kind, header in HEADERS.items()}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One round with `clients` members; bytes and messages per client, both directions."""

    clients: int
    messages: float
    update_bytes: float
    names_bytes: float
    protocol_bytes: float
    server_us: float
    """Processor time of the server per client, the opening of the sum included."""
    seconds: float
    """Of the whole round, all members in this one process."""
    max_error: float
    """Largest difference from the plain mean."""

    @property
    def total_bytes(self) -> float:
        """All three parts."""
        return self.update_bytes + self.names_bytes + self.protocol_bytes


class _NoTrunk:
    """Nothing between head and tail is trained."""

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        return {}

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        pass

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        return {}

    def end_round(self, run_id: str) -> None:
        pass


@dataclass
class _Counted:
    """The coordinator behind encoded frames."""

    coordinator: Coordinator
    now_s: float = 0.0
    messages: int = 0
    update_bytes: int = 0
    names_bytes: int = 0
    protocol_bytes: int = 0
    server_s: float = 0.0
    answers: dict[str, Header] = field(default_factory=dict)

    def exchange(self, calls: Mapping[str, tuple[Header, Mapping[str, Tensor]]]) -> None:
        """One step of all members: calls go up, answers come down into `answers`."""
        for member, (header, tensors) in calls.items():
            self._count(header, tensors)
            began_s = time.process_time()
            self.coordinator.submit(member, header, tensors, self.now_s)
            self.server_s += time.process_time() - began_s
        self._let_time_pass()
        self.answers = {member: self._answer(member, call) for member, (call, _) in calls.items()}

    def _answer(self, member: str, call: Header) -> Header:
        began_s = time.process_time()
        answer = self.coordinator.answer(member, call)
        self.server_s += time.process_time() - began_s
        assert answer is not None, f"{member} has no answer to {type(call).__name__}"
        self._count(answer.header, answer.tensors)
        return answer.header

    def _let_time_pass(self) -> None:
        """Vanished members are waited for until the deadline of the stage."""
        status = self.coordinator.status()
        if status.stage in ("gathering", "updates") and len(status.came) < len(status.cohort):
            deadline_s = self.coordinator.next_deadline_s()
            is_due = status.came or status.stage == "gathering"
            if deadline_s is not None and is_due:
                self.now_s = deadline_s
                self.coordinator.tick(self.now_s)

    def _count(self, header: Header, tensors: Mapping[str, Tensor]) -> None:
        packed = {
            name: pack_ring(x) if x.dtype == torch.int64 else encode(x)
            for name, x in tensors.items()
        }
        total = frame_bytes(Frame(_KIND_OF[type(header)], header, packed))
        update = sum(x.num_bytes for x in packed.values())
        names = sum(len(name) + 1 for name in header.cohort) if isinstance(header, Round) else 0
        self.messages += 1
        self.update_bytes += update
        self.names_bytes += names
        self.protocol_bytes += total - update - names


def measure_round(num_clients: int) -> Point:
    """One round of secure aggregation, with real keys, shares, masks and a real store."""
    began_s = time.perf_counter()
    policy = SecureSettings(max_weight=1 << 12)
    settings = FederationSettings(
        name="scale",
        rounds=1,
        secure=policy,
        min_members=num_clients,
        quorum=max(3, num_clients * 2 // 3),
        gather_s=0.0,
    )
    names = [f"hospital-{number:04}" for number in range(num_clients)]
    with (
        tempfile.TemporaryDirectory() as folder,
        FederationStore(Path(folder) / "store", "scale") as store,
    ):
        counted = _Counted(Coordinator(settings, store, _NoTrunk(), 0.0))
        for name in names:
            join = Join(federation="scale", fingerprint={"model": "m"}, layout=LAYOUT)
            counted.coordinator.join(name, join, 0.0)
        updates = _run_round(counted, policy, names)
        checkpoint = store.checkpoint()
    assert checkpoint is not None, counted.coordinator.status()
    return Point(
        clients=num_clients,
        messages=counted.messages / num_clients,
        update_bytes=counted.update_bytes / num_clients,
        names_bytes=counted.names_bytes / num_clients,
        protocol_bytes=counted.protocol_bytes / num_clients,
        server_us=counted.server_s / num_clients * 1e6,
        seconds=time.perf_counter() - began_s,
        max_error=_error(checkpoint.state, updates),
    )


def _run_round(
    counted: _Counted, policy: SecureSettings, names: Sequence[str]
) -> dict[str, tuple[Tensor, int]]:
    """All members through all steps; the updates of those that did not vanish."""
    enter = EnterRound(federation="scale", round=0, digest="", needs_state=True)
    counted.exchange({name: (enter, {}) for name in names})
    # Every member would make this from its ROUND; it is the same and immutable.
    attempt = Attempt(federation="scale", round=1, attempt=1, cohort=tuple(names), policy=policy)
    num_values = sum(math.prod(shape) for shape in LAYOUT.values())
    members = {name: SecureMember(name, attempt, num_values) for name in names}
    counted.exchange({name: (member.share_keys(), {}) for name, member in members.items()})
    counted.exchange(
        {
            name: (member.share_secrets(_as(PeerKeys, counted.answers[name])), {})
            for name, member in members.items()
        }
    )
    staying = [name for number, name in enumerate(names) if (number + 1) % _VANISHING]
    updates = {name: _update(number, num_values) for number, name in enumerate(staying)}
    calls: dict[str, tuple[Header, Mapping[str, Tensor]]] = {}
    send = SendUpdate(federation="scale", round=1, attempt=1, weight=0)
    for name in staying:
        members[name].take_secrets(_as(PeerSecrets, counted.answers[name]))
        calls[name] = (send, {"masked": members[name].mask(*updates[name])})
    counted.exchange(calls)
    counted.exchange(
        {
            name: (members[name].unmask(_as(UpdateTaken, counted.answers[name])), {})
            for name in staying
        }
    )
    return updates


def _as(kind: type[H], header: Header) -> H:
    assert isinstance(header, kind), header
    return header


def _update(number: int, num_values: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(num_values, generator=generator) * 0.01, 100 + number


def _error(state: AdapterState, updates: Mapping[str, tuple[Tensor, int]]) -> float:
    total = sum(weight for _, weight in updates.values())
    mean_N = torch.stack([x.double() * weight for x, weight in updates.values()]).sum(0) / total
    start = initial_state(LAYOUT, 0)
    found_N = torch.cat([(state[k] - start[k]).double().reshape(-1) for k in sorted(LAYOUT)])
    return float((found_N - mean_N).abs().max())


def measure_scheduler(num_clients: int, decisions: int = 50) -> float:
    """Microseconds of one decision while every client waits with a forward of 128 tokens."""
    scheduler = BatchScheduler(BatchSettings().for_trunk("cpu", can_share=True))
    waiting = [
        Waiting(client=f"c{n:04}", arrived_s=0.0, num_tokens=128, kind=WorkKind.FORWARD)
        for n in range(num_clients)
    ]
    times_us, now_s = [], 1.0
    for _ in range(decisions):
        began_s = time.perf_counter()
        choice = scheduler.next_batch(waiting, now_s)
        times_us.append((time.perf_counter() - began_s) * 1e6)
        assert choice.indices
        now_s += 0.01
    return median(times_us, skip=3)


def main(arguments: Sequence[str] | None = None) -> dict[str, Value]:
    """Measure the curve, print it, return the figures of its end."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--clients", type=int)
    own, rest = parser.parse_known_args(arguments)
    shared = parse_arguments(__doc__ or "", rest)
    torch.set_num_threads(1)
    sizes = SMOKE if shared.is_smoke else STANDARD
    if own.clients is not None:
        sizes = (*(size for size in sizes if size < own.clients), own.clients)
    points = [measure_round(size) for size in sizes]
    _print_curve(points)
    result = _result(points, measure_scheduler(sizes[-1]))
    emit(result, shared)
    return result


def _print_curve(points: Sequence[Point]) -> None:
    columns = ("clients", "messages", "total B", "update B", "names B", "protocol B", "server us")
    rows = [
        (p.clients, p.messages, p.total_bytes, p.update_bytes, p.names_bytes, p.protocol_bytes,
         p.server_us)
        for p in points
    ]  # fmt: skip
    print_table("a client's round, both directions", columns, rows)


def _result(points: Sequence[Point], scheduler_us: float) -> dict[str, Value]:
    last = points[-1]
    # From the last complete graph on, partners grow with the logarithm.
    first = max((p for p in points if p.clients < COMPLETE), key=lambda p: p.clients)
    log_growth = math.log(last.clients) / math.log(first.clients)
    return {
        "clients": last.clients,
        "messages_per_client": last.messages,
        "server_bytes_per_client": last.total_bytes,
        "update_bytes_per_client": last.update_bytes,
        "names_bytes_per_client": last.names_bytes,
        "protocol_bytes_per_client": last.protocol_bytes,
        "growth_from_clients": first.clients,
        "log_growth": log_growth,
        "bytes_growth": last.total_bytes / first.total_bytes,
        "protocol_growth": last.protocol_bytes / first.protocol_bytes,
        "server_us_per_client": last.server_us,
        "scheduler_us_per_decision": scheduler_us,
        "max_error": max(point.max_error for point in points),
        "seconds": sum(point.seconds for point in points),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
