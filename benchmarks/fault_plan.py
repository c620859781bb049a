"""What goes wrong in a scenario of the fault campaign: a function of its seed, and nothing else.

It runs nothing. The same seed gives the same plan; threads and processes may still meet in
another order.
"""

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

__all__ = ["COMMIT_STAGES", "SERVER", "Deed", "Fault", "Mode", "Plan", "plan_of"]

T = TypeVar("T")
SERVER = "server"
NAMES = ("anna", "bert", "cleo", "dora", "emil")
LEAST = 3
"""Members without whom no round can be."""


class Mode(StrEnum):
    """How updates travel and what they are."""

    SECURE = "secure"
    HIDDEN = "hidden"
    PLAIN = "plain"
    EVERY_STEP = "every_step"
    """Gradients, under secure aggregation."""


class Deed(StrEnum):
    """What happens to the victim."""

    KILL = "kill"
    """Its process ends; its connections break."""
    VANISH = "vanish"
    """Its machine ends; nobody is told."""
    PAUSE = "pause"
    SLOW = "slow"
    LOSE_CALL = "lose_call"
    """A call is lost with its connection."""
    LOSE_REPLY = "lose_reply"
    """The answer is lost with its connection: the call is sent again."""
    PARTITION = "partition"
    PARTITION_UP = "partition_up"
    """What the member sends is lost, what the server sends arrives."""
    PARTITION_DOWN = "partition_down"
    DUPLICATE = "duplicate"
    REPLAY = "replay"
    """An old call comes again."""
    REORDER = "reorder"
    """A call comes after the one that follows it."""
    CORRUPT = "corrupt"
    LATE = "late"
    """It joins after the others."""
    ROLLBACK = "rollback"
    """The server is restored from the backup of an older round."""
    BREAK = "break"
    """Real processes: the proxy in front of the server dies, every connection breaks."""


COMMIT_STAGES = ("before files", "before row", "after row")
"""Moments while the coordinator makes a round durable."""

_MEMBER_STAGES = (
    "JOIN",
    "ENTER_ROUND",
    "SHARE_KEYS",
    "SHARE_SECRETS",
    "OPEN_RUN",
    "FORWARD",
    "BACKWARD",
    "COMMIT",
    "SEND_UPDATE",
    "UNMASK",
    "ADOPT",
)
_MASKED_STAGES = {"SHARE_KEYS", "SHARE_SECRETS", "UNMASK"}
_MEMBER_DEEDS = {
    Deed.KILL: 5,
    Deed.VANISH: 2,
    Deed.PAUSE: 3,
    Deed.SLOW: 1,
    Deed.LOSE_CALL: 2,
    Deed.LOSE_REPLY: 4,
    Deed.PARTITION: 2,
    Deed.PARTITION_UP: 1,
    Deed.PARTITION_DOWN: 2,
    Deed.DUPLICATE: 3,
    Deed.REPLAY: 3,
    Deed.REORDER: 2,
    Deed.CORRUPT: 4,
    Deed.LATE: 1,
}
_SERVER_DEEDS = {Deed.KILL: 6, Deed.PAUSE: 2, Deed.SLOW: 1, Deed.ROLLBACK: 1}
_MODES = {Mode.SECURE: 10, Mode.HIDDEN: 3, Mode.PLAIN: 4, Mode.EVERY_STEP: 3}
_SERVER_SHARE = 0.3
_REAL_DEEDS = (
    (Deed.KILL, "anna"),
    (Deed.KILL, SERVER),
    (Deed.PAUSE, "anna"),
    (Deed.PAUSE, SERVER),
    (Deed.BREAK, SERVER),
    (Deed.PARTITION, SERVER),
    (Deed.SLOW, SERVER),
    (Deed.KILL, "replica"),
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    victim: str
    """A member, or `SERVER`; "replica" among real processes."""
    deed: Deed
    stage: str
    """Kind of the victim's call (for the server: of anybody's), or one of `COMMIT_STAGES`."""
    occurrence: int
    """Which such call, from 1."""
    is_after: bool
    """The call has arrived; else it has not."""
    seconds: float
    """How long it lasts, or until the victim is back."""
    returns: bool
    """Who was killed is started again."""
    pick: float
    """From 0 to 1: chooses among what the deed leaves open."""

    def __str__(self) -> str:
        when = "after" if self.is_after else "at"
        back = "" if self.returns else ", for good"
        return (
            f"{self.deed} {self.victim} {when} {self.stage}#{self.occurrence}"
            f" {self.seconds:.1f}s{back}"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A scenario."""

    seed: int
    mode: Mode
    members: tuple[str, ...]
    rounds: int
    local_steps: int
    faults: tuple[Fault, ...]
    is_real: bool
    """Processes over mutual TLS, killed by signals; else threads over loopback channels."""

    @property
    def victims(self) -> frozenset[str]:
        """Who may end with an error while the others do not."""
        return frozenset(fault.victim for fault in self.faults)

    def __str__(self) -> str:
        kind = "processes" if self.is_real else "threads"
        faults = "; ".join(map(str, self.faults))
        return f"{self.mode} {len(self.members)} members {self.rounds} rounds, {kind}: {faults}"


def plan_of(seed: int, is_real: bool = False) -> Plan:
    """The scenario of a seed."""
    rng = random.Random(f"cutlayer faults {seed} {is_real}")
    mode = _drawn(rng, _MODES)
    members = NAMES[: rng.choice((4, 4, 5))]
    faults: list[Fault] = []
    num_faults = 1 if is_real else rng.choice((1, 1, 2, 2, 3))
    while len(faults) < num_faults:
        fault = _real_fault(rng, seed) if is_real else _fault(rng, mode, members, faults)
        faults.extend([] if fault is None else [fault])
    return Plan(
        seed=seed,
        mode=mode,
        members=members,
        rounds=2 if is_real else rng.choice((2, 2, 3)),
        local_steps=1 if mode is Mode.EVERY_STEP else rng.choice((1, 2)),
        faults=tuple(faults),
        is_real=is_real,
    )


def _fault(
    rng: random.Random, mode: Mode, members: tuple[str, ...], faults: list[Fault]
) -> Fault | None:
    """One more; None where it would leave too few members."""
    is_server = rng.random() < _SERVER_SHARE
    victim = SERVER if is_server else rng.choice(members)
    deed = _drawn(rng, _SERVER_DEEDS if is_server else _MEMBER_DEEDS)
    stages = [s for s in _MEMBER_STAGES if mode is not Mode.PLAIN or s not in _MASKED_STAGES]
    if is_server and deed in (Deed.KILL, Deed.ROLLBACK):
        stages = [*stages, *COMMIT_STAGES * 2]
    lost = {fault.victim for fault in faults if _is_costly(fault)}
    may_lose = is_server or len(members) - len(lost | {victim}) >= LEAST
    if deed is Deed.CORRUPT and not may_lose:
        return None
    stage = "JOIN" if deed is Deed.LATE else rng.choice(stages)
    most = len(members) if is_server and stage not in COMMIT_STAGES else 2
    return Fault(
        victim=victim,
        deed=deed,
        stage=stage,
        occurrence=rng.randint(1, most),
        is_after=rng.random() < 0.5,
        seconds=rng.choice((0.3, 0.8, 1.6, 2.5)),
        returns=not may_lose or is_server or rng.random() < 0.7,
        pick=rng.random(),
    )


def _real_fault(rng: random.Random, number: int) -> Fault:
    deed, victim = _REAL_DEEDS[number % len(_REAL_DEEDS)]
    return Fault(
        victim=victim,
        deed=deed,
        stage=rng.choice(("JOIN", "SHARE_KEYS", "TRAINING", "BETWEEN")),
        occurrence=1,
        is_after=False,
        seconds=rng.choice((0.5, 2.0, 4.0)),
        returns=True,
        pick=rng.random(),
    )


def _is_costly(fault: Fault) -> bool:
    """Whether its victim may be missing in the end."""
    is_gone = fault.deed in (Deed.KILL, Deed.VANISH) and not fault.returns
    return fault.victim != SERVER and (is_gone or fault.deed is Deed.CORRUPT)


def _drawn(rng: random.Random, weights: dict[T, int]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]
