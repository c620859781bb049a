"""A client process of the serving benchmark: it stays open and generates what it is asked for.

As a module it reads an `Opening` that says which server it uses, then answers `Job`s with
`JobRun`s (`workers`). It does not compare, print or know the baselines.
"""

import tempfile
import time
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.isolate import answer, read_request
from benchmarks.split import SplitRequest, client_settings
from benchmarks.workers import requests, say_ready
from cutlayer import Client
from cutlayer.client.decoder import Decoder
from cutlayer.client.session import Feed
from cutlayer.client.settings import (
    DraftKind,
    GenerationSettings,
    SamplingSettings,
    SpeculationSettings,
)
from cutlayer.client.streams import NewToken, Request, Stream

__all__ = ["Job", "JobRun", "Opening", "Steps", "StreamRun", "StreamSpec"]


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """Which server a client process uses, and how."""

    request: SplitRequest
    draft_model: str | None = None
    """Folder of the small model, for drafts by one."""


class StreamSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One stream to generate."""

    prompt: list[int]
    new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    eos_ids: list[int] = []


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of the trunk with one row, one after the other, without choosing tokens."""

    lengths: list[int]
    """Tokens that each of them feeds."""
    is_fresh: bool = False
    """Feed the whole row each time, as if nothing was ever cached."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process is to do: streams together, or steps."""

    streams: list[StreamSpec] = []
    draft: str = "none"
    """A `DraftKind`."""
    max_drafts: int = 8
    min_match: int = 2
    is_held: bool = False
    """Wait for the parent's `go` when every stream has its first token."""
    steps: Steps | None = None


class StreamRun(msgspec.Struct, frozen=True, kw_only=True):
    """What one stream gave."""

    tokens: list[int]
    ends_s: list[float]
    """When each token was chosen, on the machine's monotonic clock."""
    num_round_trips: int
    num_drafted: int
    num_accepted: int


class JobRun(msgspec.Struct, frozen=True, kw_only=True):
    """What a job took."""

    begin_s: float
    """Monotonic clock."""
    cpu_s: float
    """Processor time of the process for all of it."""
    streams: list[StreamRun] = []
    step_seconds: list[float] = []
    """Of each step, head and tail included."""
    trunk_seconds: list[float] = []
    """Of each step without the tail: from a token to the trunk's answer."""


def _run_streams(client: Client, job: Job) -> list[StreamRun]:
    _set_generation(client, _settings(job, client.settings.generation.speculation.model))
    generator = client.generator()
    decoder = generator.decoder(generator.session())
    ends_s: list[list[float]] = [[] for _ in job.streams]
    streams = [
        decoder.add(_request(spec, number, times))
        for number, (spec, times) in enumerate(zip(job.streams, ends_s, strict=True))
    ]
    try:
        if job.is_held:
            _take_turns(decoder, lambda: any(not stream.tokens for stream in streams))
            say_ready()
        _take_turns(decoder, lambda: any(stream.finish is None for stream in streams))
    finally:
        decoder.close()
    _raise_first(streams)
    return [
        StreamRun(
            tokens=stream.tokens,
            ends_s=times,
            num_round_trips=stream.num_round_trips,
            num_drafted=stream.num_drafted,
            num_accepted=stream.num_accepted,
        )
        for stream, times in zip(streams, ends_s, strict=True)
    ]


def _set_generation(client: Client, settings: GenerationSettings) -> None:
    client.settings = client.settings.model_copy(update={"generation": settings})


def _load_draft_model(client: Client, draft_model: str | None) -> None:
    """Settle which small model there is: the client loads it once, before its first generation."""
    kind = DraftKind.NONE if draft_model is None else DraftKind.MODEL
    speculation = SpeculationSettings(kind=kind, model=draft_model)
    _set_generation(client, GenerationSettings(speculation=speculation))
    client.generator()


def _settings(job: Job, draft_model: str | None) -> GenerationSettings:
    return GenerationSettings(
        # A kept row would spare a repeated measurement its prefill.
        keep_rows=0,
        speculation=SpeculationSettings(
            kind=DraftKind(job.draft),
            max_tokens=job.max_drafts,
            min_match=job.min_match,
            model=draft_model,
        ),
    )


def _request(spec: StreamSpec, number: int, ends_s: list[float]) -> Request:
    def watch(new: NewToken) -> bool:
        ends_s.append(time.monotonic())
        return False

    sampling = SamplingSettings(
        max_new_tokens=spec.new_tokens,
        temperature=spec.temperature,
        top_k=spec.top_k,
        seed=spec.seed,
    )
    return Request(
        prompt=spec.prompt,
        sampling=sampling,
        eos_ids=frozenset(spec.eos_ids),
        watch=watch,
        draw=number,
    )


def _take_turns(decoder: Decoder, is_needed: Callable[[], bool]) -> None:
    while is_needed():
        pause_s = decoder.step()
        if pause_s is None:
            return
        time.sleep(pause_s)


def _raise_first(streams: Sequence[Stream]) -> None:
    for stream in streams:
        if stream.error is not None:
            raise stream.error


def _run_steps(client: Client, steps: Steps) -> tuple[list[float], list[float]]:
    session = client.session()
    most = max(steps.lengths) if steps.is_fresh else sum(steps.lengths)
    row = session.open_row(most)
    seconds, trunk_seconds = [], []
    for length in steps.lengths:
        if steps.is_fresh:
            session.truncate(row, 0)
        # Time depends on the number of tokens alone.
        feed = Feed(row=row, tokens=[1 + place % 200 for place in range(length)])
        begin_s = time.perf_counter()
        pending = session.begin([feed])
        pending.call.call.result()
        trunk_seconds.append(time.perf_counter() - begin_s)
        session.finish(pending)
        seconds.append(time.perf_counter() - begin_s)
    session.close()
    return seconds, trunk_seconds


def _do(client: Client, job: Job) -> JobRun:
    begin_s, cpu_s = time.monotonic(), time.process_time()
    streams = _run_streams(client, job) if job.streams else []
    seconds, trunk_seconds = _run_steps(client, job.steps) if job.steps else ([], [])
    return JobRun(
        begin_s=begin_s,
        cpu_s=time.process_time() - cpu_s,
        streams=streams,
        step_seconds=seconds,
        trunk_seconds=trunk_seconds,
    )


def main() -> None:
    """Answer jobs until stdin is closed."""
    opening = read_request(Opening)
    with (
        tempfile.TemporaryDirectory() as folder,
        Client(client_settings(opening.request, folder)) as client,
    ):
        _load_draft_model(client, opening.draft_model)
        client.trunk.hello()
        say_ready()
        for job in requests(Job):
            answer(_do(client, job))


if __name__ == "__main__":
    main()
