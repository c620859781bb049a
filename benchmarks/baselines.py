"""The unsplit and the naive baseline as one call each: processes, link and fastest thread setting.

It does not know cutlayer's own client or server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from benchmarks.isolate import run_isolated
from benchmarks.link import Counters, DelayingProxy, LinkProfile
from benchmarks.naive import NaiveGeneration, NaiveRequest, NaiveServer, NaiveTraining
from benchmarks.report import median
from benchmarks.unsplit import Decoding, Training, UnsplitRequest

__all__ = [
    "NaiveSetup",
    "Timed",
    "fastest",
    "naive_generation",
    "naive_training",
    "unsplit_decoding",
    "unsplit_training",
]

T = TypeVar("T")

WARM_UP = 1
"""First steps or tokens of every measurement that are left out."""


@dataclass(frozen=True, kw_only=True)
class Timed(Generic[T]):
    """A measurement at the thread setting that it was made with."""

    seconds: float
    """Median per step or token, or the whole of a generation."""
    num_threads: int
    """Torch threads of each process."""
    details: T


@dataclass(frozen=True, kw_only=True)
class NaiveSetup:
    """Where the naive baseline runs."""

    model_folder: Path
    lower: int
    upper: int
    link: LinkProfile
    mask_form: str = "dense-s"
    num_threads: int = 1
    """Of the server and of the client: they never work at the same time."""


def fastest(measure: Callable[[int], Timed[T]], thread_settings: Sequence[int]) -> Timed[T]:
    """Measure at every thread setting and keep the fastest."""
    return min((measure(count) for count in thread_settings), key=lambda timed: timed.seconds)


def unsplit_training(request: UnsplitRequest, num_threads: int) -> Timed[Training]:
    """Seconds of one optimizer step of the unsplit model."""
    done = run_isolated("benchmarks.unsplit", request, Training, num_threads=num_threads)
    return Timed(seconds=median(done.seconds, skip=WARM_UP), num_threads=num_threads, details=done)


def unsplit_decoding(request: UnsplitRequest, num_threads: int) -> Timed[Decoding]:
    """Seconds of one decoded token of the unsplit model, prefill excluded."""
    done = run_isolated("benchmarks.unsplit", request, Decoding, num_threads=num_threads)
    return Timed(seconds=median(done.seconds, skip=WARM_UP), num_threads=num_threads, details=done)


def naive_training(
    setup: NaiveSetup, rows: list[list[int]], steps: int
) -> tuple[Timed[NaiveTraining], Counters]:
    """Seconds of one naive optimizer step, and the bytes of all steps at the proxy."""
    with _serving(setup) as server, DelayingProxy(server.port, setup.link) as proxy:
        request = _request(setup, proxy, rows, steps=steps)
        done = run_isolated(
            "benchmarks.naive", request, NaiveTraining, num_threads=setup.num_threads
        )
        crossed = proxy.counters()
    seconds = median(done.seconds, skip=WARM_UP)
    return Timed(seconds=seconds, num_threads=setup.num_threads, details=done), crossed


def naive_generation(
    setup: NaiveSetup, prompt: list[int], new_tokens: int, lengths_sampled: int | None = 8
) -> Timed[NaiveGeneration]:
    """Seconds of a whole naive generation, summed from the measured lengths."""
    with _serving(setup) as server, DelayingProxy(server.port, setup.link) as proxy:
        request = _request(
            setup, proxy, [prompt], new_tokens=new_tokens, lengths_sampled=lengths_sampled
        )
        done = run_isolated(
            "benchmarks.naive", request, NaiveGeneration, num_threads=setup.num_threads
        )
    return Timed(seconds=done.seconds, num_threads=setup.num_threads, details=done)


def _serving(setup: NaiveSetup) -> NaiveServer:
    return NaiveServer(setup.model_folder, setup.lower, setup.upper, setup.num_threads)


def _request(
    setup: NaiveSetup,
    proxy: DelayingProxy,
    rows: list[list[int]],
    *,
    steps: int = 0,
    new_tokens: int = 0,
    lengths_sampled: int | None = None,
) -> NaiveRequest:
    return NaiveRequest(
        port=proxy.port,
        model_folder=str(setup.model_folder),
        lower=setup.lower,
        upper=setup.upper,
        rows=rows,
        mask_form=setup.mask_form,
        steps=steps,
        new_tokens=new_tokens,
        lengths_sampled=lengths_sampled,
    )
