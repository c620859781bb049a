"""A client process of `benchmarks.replicas`: records a client's frames once, then feeds them.

Feeding computes nothing: frames go as they were recorded, several in flight, so that the replica is
never idle. It does not measure what it feeds to, nor choose cores.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from benchmarks.isolate import answer
from benchmarks.subjects import equal_rows
from benchmarks.workers import requests, say_ready
from cutlayer import Client, ClientSettings
from cutlayer.client.settings import Schedule, TrainSettings
from cutlayer.client.train import TrainingData
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import Example
from cutlayer.identity.provision import member_files
from cutlayer.settings import parse_settings
from cutlayer.wire.endpoints import ConnectionSettings, TlsFiles
from cutlayer.wire.frame import Frame
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.messages import Forward, Hello, OpenRun, Welcome
from cutlayer.wire.recording import open_recording

__all__ = ["FeedRequest", "FeedResult"]

_IN_FLIGHT = 4


class FeedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Record if `rows` are given, else feed."""

    address: str
    """Of the front."""
    kit: str
    recording: str
    """File of the recorded frames."""
    core: int | None = None
    """Run on this core alone."""
    model_folder: str = ""
    lower: int = 0
    upper: int = 0
    rows: int = 0
    length: int = 0
    vocab_size: int = 0
    steps: int = 0


class FeedResult(msgspec.Struct, frozen=True, kw_only=True):
    """What it took."""

    place: str
    """The replica."""
    num_tokens: int
    """Of all FORWARDs."""
    seconds: float
    """From the first FORWARD to the last answer."""


def main() -> None:
    """Answer one request after the other."""
    for request in requests(FeedRequest):
        if request.core is not None:
            os.sched_setaffinity(0, {request.core})
        answer(_record(request) if request.rows else _feed(request))


def _record(request: FeedRequest) -> FeedResult:
    """Train a few steps for real; every frame is kept."""
    say_ready()
    began_s = time.perf_counter()
    with TemporaryDirectory() as folder, Client(_settings(request, Path(folder))) as client:
        rows = equal_rows(request.rows, request.length, request.vocab_size)
        examples = [
            Example(tokens=row, labels=[-100, *row[1:]], row_id=index)
            for index, row in enumerate(rows)
        ]
        plan = BatchPlan(num_rows=len(rows), rows_per_step=len(rows), steps=request.steps)
        data = TrainingData(train=examples, validation=[], plan=plan)
        settings = TrainSettings(
            steps=request.steps,
            rows_per_step=len(rows),
            schedule=Schedule.CONSTANT,
            save_every=1_000_000,
        )
        client.trainer(data, settings).run()
    seconds = time.perf_counter() - began_s
    num_tokens = request.rows * request.length * request.steps
    return FeedResult(place="", num_tokens=num_tokens, seconds=seconds)


def _settings(request: FeedRequest, folder: Path) -> ClientSettings:
    table = {
        "model": {"path": request.model_folder, "lower": request.lower, "upper": request.upper},
        "connection": {
            "address": request.address,
            "codec": "bf16",
            "tls": member_files(Path(request.kit)).tls,
        },
        "privacy": {"mechanism": "none"},
        "run": {"folder": str(folder / "run"), "record_file": request.recording},
    }
    return parse_settings(ClientSettings, table, "benchmark client")


def _feed(request: FeedRequest) -> FeedResult:
    frames = list(_recorded_calls(Path(request.recording)))
    (hello,) = (frame for frame in frames if isinstance(frame.header, Hello))
    (opened,) = (frame for frame in frames if isinstance(frame.header, OpenRun))
    training = [frame for frame in frames if frame not in (hello, opened)]
    with _channel(request, request.address) as front:
        welcome = front.call(hello).result().header
    assert isinstance(welcome, Welcome)
    with _channel(request, welcome.place) as channel:
        channel.call(hello).result()
        channel.call(opened).result()
        say_ready()
        began_s = time.perf_counter()
        _send_all(channel, training)
        seconds = time.perf_counter() - began_s
    tokens = (sum(f.header.lengths) for f in training if isinstance(f.header, Forward))
    return FeedResult(place=welcome.place, num_tokens=sum(tokens), seconds=seconds)


def _send_all(channel: GrpcChannel, frames: list[Frame]) -> None:
    waiting: deque[Future[Frame]] = deque()
    for frame in frames:
        waiting.append(channel.call(frame))
        if len(waiting) >= _IN_FLIGHT:
            waiting.popleft().result()
    for future in waiting:
        future.result()


def _recorded_calls(path: Path) -> Iterator[Frame]:
    """What the client sent to its replica; the other connection only asked for the place."""
    recorded = list(open_recording(path).frames())
    last = max(item.connection for item in recorded)
    return (item.frame for item in recorded if item.is_sent and item.connection == last)


@contextmanager
def _channel(request: FeedRequest, address: str) -> Iterator[GrpcChannel]:
    tls = TlsFiles.model_validate(member_files(Path(request.kit)).tls)
    channel = GrpcChannel(ConnectionSettings(address=address, tls=tls))
    try:
        yield channel
    finally:
        channel.close()


if __name__ == "__main__":
    main()
