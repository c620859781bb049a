"""A cohort that speaks secure aggregation with itself, and may lose members at every step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.secure.peers import Signer, Verifier
from cutlayer.federation.secure.ring import dequantise
from cutlayer.federation.secure.server import SecureRound
from cutlayer.federation.settings import SecureSettings

__all__ = ["NOBODY", "NUM_VALUES", "Crowd", "Gone", "attempt_of", "names", "plain_mean", "updates"]

NUM_VALUES = 5
Update = tuple[Tensor, int]


@dataclass(frozen=True, kw_only=True)
class Gone:
    """Who vanishes before which step."""

    keys: Collection[str] = ()
    secrets: Collection[str] = ()
    update: Collection[str] = ()
    unmask: Collection[str] = ()


NOBODY = Gone()


def names(count: int) -> list[str]:
    return [f"owner{number}" for number in range(count)]


def attempt_of(
    cohort: Collection[str],
    policy: SecureSettings | None = None,
    number: int = 1,
    round_number: int = 1,
) -> Attempt:
    return Attempt(
        federation="oncology",
        round=round_number,
        attempt=number,
        cohort=tuple(cohort),
        policy=policy or SecureSettings(),
    )


def updates(cohort: Collection[str], num_values: int = NUM_VALUES) -> dict[str, Update]:
    """Values as adapters have them, with the weight of a few batches; the same every time."""
    generator = torch.Generator().manual_seed(len(cohort))
    return {
        name: (
            torch.randn(num_values, generator=generator) * 0.02,
            int(torch.randint(1, 5000, (), generator=generator)),
        )
        for name in cohort
    }


def plain_mean(taken: Mapping[str, Update]) -> Tensor:
    total = sum(weight for _, weight in taken.values())
    parts = [values_N.double() * weight for values_N, weight in taken.values()]
    return torch.stack(parts).sum(0) / total


@dataclass
class Crowd:
    """Members and server of one attempt; each step returns who took it."""

    attempt: Attempt
    num_values: int = NUM_VALUES
    credentials: Mapping[str, tuple[Signer, Verifier]] = field(default_factory=dict)
    members: dict[str, SecureMember] = field(init=False)
    server: SecureRound = field(init=False)

    def __post_init__(self) -> None:
        self.members = {
            name: SecureMember(
                name, self.attempt, self.num_values, *self.credentials.get(name, (None, None))
            )
            for name in self.attempt.cohort
        }
        self.server = SecureRound(self.attempt, self.num_values)

    def send_keys(self, gone: Collection[str] = ()) -> list[str]:
        came = [name for name in self.members if name not in gone]
        for name in came:
            self.server.add_keys(name, self.members[name].share_keys())
        self.server.close_keys()
        return came

    def send_secrets(self, asked: Collection[str], gone: Collection[str] = ()) -> list[str]:
        came = [name for name in asked if name not in gone]
        for name in came:
            shared = self.members[name].share_secrets(self.server.peer_keys(name))
            self.server.add_secrets(name, shared)
        self.server.close_secrets()
        return came

    def send_updates(
        self, asked: Collection[str], sent: Mapping[str, Update], gone: Collection[str] = ()
    ) -> list[str]:
        for name in asked:
            self.members[name].take_secrets(self.server.peer_secrets(name))
        came = [name for name in asked if name not in gone]
        for name in came:
            self.server.add_masked(name, self.members[name].mask(*sent[name]))
        self.server.close_updates()
        return came

    def unmask(self, asked: Collection[str], gone: Collection[str] = ()) -> list[str]:
        came = [name for name in asked if name not in gone]
        for name in came:
            answer = self.members[name].unmask(self.server.taken(name))
            self.server.add_unmask(name, answer)
        return came

    def run(self, sent: Mapping[str, Update], gone: Gone = NOBODY) -> tuple[Tensor, list[str]]:
        """The opened mean, and whose updates are in it."""
        asked = self.send_keys(gone.keys)
        asked = self.send_secrets(asked, gone.secrets)
        survivors = self.send_updates(asked, sent, gone.update)
        self.unmask(survivors, gone.unmask)
        total_M = self.server.total()
        mean_N, _ = dequantise(total_M, self.attempt.policy, len(survivors))
        return mean_N, survivors
