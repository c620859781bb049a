"""Several client processes at one trunk: their total, what the trunk does, and who gets how much.

It does not print.
"""

from dataclasses import dataclass

from benchmarks.report import median
from benchmarks.serving_local import jobs
from benchmarks.serving_statistics import common_rates, jain_index
from benchmarks.serving_world import HeldRuns, ServedModel, Worlds

__all__ = ["ClientsCase", "ClientsFigures", "measure_clients"]


@dataclass(frozen=True, kw_only=True)
class ClientsCase:
    """What is measured."""

    model: ServedModel
    num_clients: int
    prompt_length: int
    new_tokens: int
    repeats: int
    server_threads: int


@dataclass(frozen=True, kw_only=True)
class ClientsFigures:
    """Medians over the repeats."""

    one_tokens_per_s: float
    total_tokens_per_s: float
    one_trunk_tokens_per_s: float
    """Per second of runner time."""
    trunk_tokens_per_s: float
    trunk_cpu_over_one: float
    """The trunk's tokens per second of its thread's processor time, all clients over one."""
    fairness: float
    """Jain's index of the clients' tokens/s; the smallest of the repeats."""
    is_greedy_equal: bool
    """Each client's tokens are those of its first run, alone or not."""

    @property
    def total_over_one(self) -> float:
        """Tokens/s of all clients over one's."""
        return self.total_tokens_per_s / self.one_tokens_per_s

    @property
    def trunk_over_one(self) -> float:
        """The trunk's tokens per second of runner time, all clients over one."""
        return self.trunk_tokens_per_s / max(self.one_trunk_tokens_per_s, 1e-9)


def measure_clients(case: ClientsCase, worlds: Worlds) -> ClientsFigures:
    """One client and all of them in turn; each computes with one thread."""
    plan = jobs(case.model, case.prompt_length, case.new_tokens, case.num_clients, is_held=True)
    with worlds.open(
        case.model,
        case.server_threads,
        num_clients=case.num_clients,
        client_threads=1,
    ) as world:
        world.run_held(plan)  # warms all of them up
        ones, alls = [], []
        for _ in range(case.repeats):
            ones.append(world.run_held(plan[:1]))
            alls.append(world.run_held(plan))
    # What came before the parent's `go` is no time of decoding.
    rates = [common_rates(_after_go(held)) for held in alls]
    return ClientsFigures(
        one_tokens_per_s=median([common_rates(_after_go(held)).total for held in ones]),
        total_tokens_per_s=median([found.total for found in rates]),
        one_trunk_tokens_per_s=median([held.trunk_tokens_per_s for held in ones]),
        trunk_tokens_per_s=median([held.trunk_tokens_per_s for held in alls]),
        trunk_cpu_over_one=median([held.trunk_tokens_per_cpu_s for held in alls])
        / max(median([held.trunk_tokens_per_cpu_s for held in ones]), 1e-9),
        fairness=min(jain_index(found.tokens_per_s) for found in rates),
        is_greedy_equal=len({_tokens(held) for held in alls}) == 1
        and all(_tokens(held)[0] == _tokens(alls[0])[0] for held in ones),
    )


def _after_go(held: HeldRuns) -> list[list[float]]:
    return [ends_s[1:] for ends_s in held.ends_s]


def _tokens(held: HeldRuns) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(stream.tokens) for run in held.runs for stream in run.streams)
