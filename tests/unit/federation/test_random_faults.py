"""Seeded chaos: members and server stop, return, repeat and vanish; every sum is still right."""

import random
from pathlib import Path

import pytest
import torch

from cutlayer.errors import StepExpired
from cutlayer.wire.federation_messages import SendUpdate, ShareKeys, ShareSecrets, Unmask
from tests.unit.federation.rounds_world import World

NAMES = "abcdef"
_STEPS = (ShareKeys, ShareSecrets, SendUpdate, Unmask)


def _disturb(world: World, rng: random.Random) -> None:
    member = world.members[rng.choice(NAMES)]
    action = rng.choice(("poll", "poll", "poll", "stop", "heal", "lost", "kill", "time", "server"))
    if action == "poll":
        for _ in range(rng.randint(1, 6)):
            world.members[rng.choice(NAMES)].poll()
    elif action == "stop":
        step = rng.choice(_STEPS)
        member.stops_before = lambda call: isinstance(call, step)
    elif action == "heal":
        member.stops_before = lambda call: False
    elif action == "lost":
        world.coordinator.lost(member.name, world.now_s)
        world.coordinator.seen(rng.choice(NAMES))
    elif action == "kill":
        world.coordinator.lost(member.name, world.now_s)
        member.restart()
    elif action == "server" and rng.random() < 0.3:
        world.restart()
    elif action == "time":
        world.now_s += rng.choice((0.5, 10.0, 100.0, 700.0))
        world.coordinator.tick(world.now_s)


@pytest.mark.parametrize("is_secure", [False, True], ids=["open", "secure"])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_rounds_are_the_survivors_means(
    tmp_path: Path, seed: int, is_secure: bool
) -> None:
    rng = random.Random(seed)
    secure = {"enabled": is_secure, "threshold": 0.6}
    world = World(tmp_path, rounds=4, secure=secure, max_attempts=1000)
    world.add(*NAMES)
    for _ in range(120):
        _disturb(world, rng)
        if world.coordinator.is_finished:
            break
    for member in world.members.values():
        member.stops_before = lambda call: False
        if not member.is_finished:
            member.restart()
    world.run_to(4)
    world.pump()
    rows = world.store.rounds()
    wanted = world.expected([row.survivors for row in rows])
    for key, value in world.final().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=2e-6)
    assert all(len(row.survivors) >= 3 for row in rows)
    assert all(set(row.survivors) <= set(row.cohort) for row in rows)
    assert all(member.is_finished for member in world.members.values())
    # Nobody was told anything but to enter again.
    errors = [error for member in world.members.values() for error in member.errors]
    assert all(isinstance(error, StepExpired) for error in errors), errors
