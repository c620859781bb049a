"""What goes wrong in a scenario of the fault campaign: a function of its seed, and nothing else.

It runs nothing. The same seed gives the same plan; threads and processes may still meet in
another order.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

__all__ = [
    "COMMIT_STAGES",
    "LEAST",
    "REAL_STAGES",
    "SERVER",
    "Deed",
    "Fault",
    "Mode",
    "Plan",
    "plan_of",
]

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
_ONCE = {"JOIN", "ADOPT"}
"""A member's stages that come once."""
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
_MASKED_MODES = {mode: share for mode, share in _MODES.items() if mode is not Mode.PLAIN}
_REAL_EVERY = 20
"""One scenario in so many is of real processes."""
REAL_STAGES = ("JOIN", "SHARE_KEYS", "TRAINING", "BETWEEN")
"""Moments that can be seen from outside."""
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
class _Place:
    """One point of the grid of who, what and when."""

    is_server: bool
    deed: Deed
    stage: str


def _grid() -> list[_Place]:
    """Every deed at every stage, well mixed."""
    places = [
        _Place(is_server=False, deed=deed, stage=stage)
        for deed in _MEMBER_DEEDS
        for stage in (("JOIN",) if deed is Deed.LATE else _MEMBER_STAGES)
    ]
    for deed in _SERVER_DEEDS:
        dies = deed in (Deed.KILL, Deed.ROLLBACK)
        stages = (*_MEMBER_STAGES, *(COMMIT_STAGES if dies else ()))
        places += [_Place(is_server=True, deed=deed, stage=stage) for stage in stages]
    random.Random("grid").shuffle(places)
    return places


_GRID = _grid()


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


def plan_of(seed: int) -> Plan:
    """The scenario of a seed: its first fault from the grid of all, further ones drawn."""
    is_real = seed % _REAL_EVERY == _REAL_EVERY - 1
    rng = random.Random(f"cutlayer faults {seed}")
    members = NAMES[: rng.choice((4, 4, 5))]
    faults: list[Fault] = []
    if is_real:
        mode = _drawn(rng, _MODES)
        faults.append(_real_fault(rng, seed // _REAL_EVERY))
    else:
        place = _GRID[(seed - seed // _REAL_EVERY) % len(_GRID)]
        modes = _MASKED_MODES if place.stage in _MASKED_STAGES else _MODES
        mode = _drawn(rng, modes)
        faults.append(_fault(rng, place, members, faults))
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            another = _any_place(rng, mode)
            if _may_lose(another, members, faults) or another.deed is not Deed.CORRUPT:
                faults.append(_fault(rng, another, members, faults))
    return Plan(
        seed=seed,
        mode=mode,
        members=members,
        rounds=2 if is_real else rng.choice((2, 2, 3)),
        local_steps=1 if mode is Mode.EVERY_STEP else rng.choice((1, 2)),
        faults=tuple(faults),
        is_real=is_real,
    )


def _any_place(rng: random.Random, mode: Mode) -> _Place:
    is_server = rng.random() < _SERVER_SHARE
    deeds = _SERVER_DEEDS if is_server else _MEMBER_DEEDS
    deed = _drawn(rng, deeds)
    fitting = [
        place
        for place in _GRID
        if (place.is_server, place.deed) == (is_server, deed)
        and (mode is not Mode.PLAIN or place.stage not in _MASKED_STAGES)
    ]
    return rng.choice(fitting)


def _fault(
    rng: random.Random, place: _Place, members: tuple[str, ...], faults: Sequence[Fault]
) -> Fault:
    most = 1 if place.stage in _ONCE else 2
    if place.is_server and place.stage not in COMMIT_STAGES:
        most = len(members)
    may_stay_away = (
        not place.is_server
        and place.deed in (Deed.KILL, Deed.VANISH)
        and _may_lose(place, members, faults)
    )
    return Fault(
        victim=SERVER if place.is_server else rng.choice(members),
        deed=place.deed,
        stage=place.stage,
        occurrence=rng.randint(1, most),
        is_after=rng.random() < 0.5,
        seconds=rng.choice((0.3, 0.8, 1.6, 2.5)),
        returns=not may_stay_away or rng.random() < 0.7,
        pick=rng.random(),
    )


def _may_lose(place: _Place, members: tuple[str, ...], faults: Sequence[Fault]) -> bool:
    """Whether enough members are left if this fault's victim is gone in the end."""
    num_lost = sum(map(_is_costly, faults)) + (not place.is_server)
    return len(members) - num_lost >= LEAST


def _real_fault(rng: random.Random, number: int) -> Fault:
    deed, victim = _REAL_DEEDS[number % len(_REAL_DEEDS)]
    return Fault(
        victim=victim,
        deed=deed,
        stage=rng.choice(REAL_STAGES),
        occurrence=1,
        is_after=False,
        seconds=rng.choice((0.5, 2.0, 4.0)),
        returns=True,
        pick=rng.random(),
    )


def _is_costly(fault: Fault) -> bool:
    """Whether its victim may be missing in the end."""
    is_gone = not fault.returns
    return fault.victim != SERVER and (is_gone or fault.deed is Deed.CORRUPT)


def _drawn(rng: random.Random, weights: dict[T, int]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]
