"""One stream and several of one client process, against the unsplit model: loopback, mutual TLS.

It does not print. Sides take turns, so that a change of the machine's speed meets them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.baselines import unsplit_decoding
from benchmarks.report import median
from benchmarks.serving_client import Job, StreamSpec
from benchmarks.serving_statistics import common_rates, token_ms
from benchmarks.serving_world import ServedModel, Worlds
from benchmarks.subjects import equal_rows
from benchmarks.unsplit import UnsplitRequest

__all__ = ["LocalCase", "LocalFigures", "jobs", "measure_local"]


@dataclass(frozen=True, kw_only=True)
class LocalCase:
    """What is compared."""

    model: ServedModel
    prompt_length: int
    new_tokens: int
    num_streams: int
    threads: tuple[int, ...]
    """Thread settings to try on each side; each side keeps its fastest."""
    repeats: int
    num_alone: int = 3
    """Of the streams, so many are also generated alone, to compare their tokens."""


@dataclass
class _Tried:
    """Figures of one thread setting, one for each repeat."""

    unsplit_ms: list[float] = field(default_factory=list)
    one_ms: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LocalFigures:
    """Each side at its fastest thread setting."""

    name: str
    unsplit_ms: float
    """Per token, the unsplit model."""
    one_ms: float
    """Per token, one stream."""
    total_tokens_per_s: float
    """All streams together."""
    num_streams: int
    threads: tuple[int, int, int]
    """Of the three in order."""
    is_greedy_equal: bool
    """One stream gives the unsplit model's tokens, and several give what each gives alone."""

    @property
    def ratio_local(self) -> float:
        """One stream's tokens/s over the unsplit model's."""
        return self.unsplit_ms / self.one_ms

    @property
    def total_over_one(self) -> float:
        """Tokens/s of all streams over one's."""
        return self.total_tokens_per_s * self.one_ms / 1000


def measure_local(case: LocalCase, worlds: Worlds) -> LocalFigures:
    """All three sides at every thread setting."""
    tried: dict[int, _Tried] = {}
    are_equal = [
        _try(case, worlds, count, tried.setdefault(count, _Tried())) for count in case.threads
    ]
    unsplit_ms, unsplit_threads = _best(tried, lambda one: one.unsplit_ms, min)
    one_ms, one_threads = _best(tried, lambda one: one.one_ms, min)
    total, total_threads = _best(tried, lambda one: one.total, max)
    return LocalFigures(
        name=case.model.name,
        unsplit_ms=unsplit_ms,
        one_ms=one_ms,
        total_tokens_per_s=total,
        num_streams=case.num_streams,
        threads=(unsplit_threads, one_threads, total_threads),
        is_greedy_equal=all(are_equal),
    )


def jobs(
    model: ServedModel, prompt_length: int, new_tokens: int, count: int, *, is_held: bool = False
) -> list[Job]:
    """A plain greedy stream for each of `count` clients, of prompts that differ."""
    prompts = equal_rows(count, prompt_length, model.vocab_size)
    return [
        Job(streams=[StreamSpec(prompt=prompt, new_tokens=new_tokens)], is_held=is_held)
        for prompt in prompts
    ]


def _try(case: LocalCase, worlds: Worlds, num_threads: int, tried: _Tried) -> bool:
    """Fill in the figures of one thread setting; whether all tokens are as they must be."""
    alone = jobs(case.model, case.prompt_length, case.new_tokens, case.num_streams)
    together = Job(streams=[job.streams[0] for job in alone])
    first = UnsplitRequest(
        model_folder=str(case.model.folder),
        rows=[alone[0].streams[0].prompt],
        new_tokens=case.new_tokens,
    )
    are_equal: list[bool] = []
    with worlds.open(case.model, num_threads) as world:
        solo = [world.run(job).streams[0].tokens for job in alone[: case.num_alone]]
        for _ in range(case.repeats):
            unsplit = unsplit_decoding(first, num_threads)
            tried.unsplit_ms.append(1000 * unsplit.seconds)
            tried.one_ms.append(token_ms(world.run(alone[0]).streams[0].ends_s))
            several = world.run(together).streams
            tried.total.append(common_rates([stream.ends_s for stream in several]).total)
            are_equal.append(solo == [stream.tokens for stream in several[: case.num_alone]])
            are_equal.append(solo[0] == list(unsplit.details.tokens))
    return all(are_equal)


def _best(
    tried: dict[int, _Tried],
    figures: Callable[[_Tried], Sequence[float]],
    choose: Callable[[list[tuple[float, int]]], tuple[float, int]],
) -> tuple[float, int]:
    """The best median over the thread settings, and which one it was."""
    return choose([(median(figures(one)), count) for count, one in tried.items()])
