"""A server and client processes that stay, so that the sides of one comparison share them.

It does not form ratios or print, and knows no baseline.
"""

import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from transformers import AutoConfig

from benchmarks.link import LINK_PROFILES, Counters
from benchmarks.many_links import Links
from benchmarks.serving_client import Job, JobRun, Opening
from benchmarks.split import SplitRequest, SplitServer
from benchmarks.workers import Worker
from cutlayer.identity.provision import LocalFolders

__all__ = [
    "HeldRuns",
    "ServedModel",
    "World",
    "Worlds",
    "owner_names",
    "parse_metrics",
    "served_model",
]

_DECODE_TOKENS = "cutlayer_decode_tokens_total"
_DECODE_SECONDS = "cutlayer_decode_runner_seconds_total"
_DECODE_CPU_SECONDS = "cutlayer_decode_runner_cpu_seconds_total"


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model and its cut."""

    name: str
    folder: Path
    lower: int
    upper: int
    vocab_size: int
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class HeldRuns:
    """Clients that decoded at once, and what the trunk did meanwhile."""

    runs: list[JobRun]
    trunk_tokens: float
    """Tokens that the trunk decoded."""
    trunk_s: float
    """For which its runner worked."""
    trunk_cpu_s: float
    """Processor time of the runner's thread: beside busy clients on the same cores it is less."""

    @property
    def trunk_tokens_per_cpu_s(self) -> float:
        """Per second of the runner's processor time, of a server of one thread."""
        return self.trunk_tokens / self.trunk_cpu_s if self.trunk_cpu_s else 0.0

    @property
    def trunk_tokens_per_s(self) -> float:
        """Per second of runner time; 0 where the server counted nothing."""
        return self.trunk_tokens / self.trunk_s if self.trunk_s else 0.0

    @property
    def ends_s(self) -> list[list[float]]:
        """Times of the tokens of every stream of every client."""
        return [stream.ends_s for run in self.runs for stream in run.streams]


class World:
    """A trunk server over mutual TLS, and owners as processes; a context manager.

    Args:
        model: what is served.
        kits: certificates; one of `owner_names` for each client.
        num_threads: torch threads of the server, and of each client.
        num_clients: client processes.
        codec: of the vectors.
        link: key of `LINK_PROFILES`, through a proxy for each client; None connects directly.
        client_threads: torch threads of a client where they are not the server's.
        draft_model: folder of the small model, for drafts by one.
    """

    def __init__(
        self,
        model: ServedModel,
        kits: LocalFolders,
        num_threads: int,
        *,
        num_clients: int = 1,
        codec: str = "raw",
        link: str | None = None,
        client_threads: int | None = None,
        draft_model: str | None = None,
    ) -> None:
        self.model, self.num_threads = model, num_threads
        self._kits, self._codec, self._draft_model = kits, codec, draft_model
        with ExitStack() as stack:
            self._server = stack.enter_context(
                SplitServer(
                    model.folder, model.lower, model.upper, kits, num_threads, has_metrics=True
                )
            )
            self._links = None
            if link is not None:
                links = Links(self._server.port, LINK_PROFILES[link], num_clients)
                self._links = stack.enter_context(links)
            self._workers = []
            for _ in range(num_clients):
                worker = Worker("benchmarks.serving_client", client_threads or num_threads)
                stack.callback(worker.close)
                self._workers.append(worker)
            self._open_clients()
            self._stack = stack.pop_all()

    @property
    def server_pid(self) -> int:
        """Of the server process."""
        return self._server.pid

    def run(self, job: Job) -> JobRun:
        """Have the first client do a job that is not held."""
        self._workers[0].send(job)
        return self._workers[0].result(JobRun)

    def run_held(self, jobs: Sequence[Job]) -> HeldRuns:
        """Have the first clients do a job each: all read their prompts, then all decode at once."""
        chosen = self._workers[: len(jobs)]
        for worker, job in zip(chosen, jobs, strict=True):
            worker.send(job)
        for worker in chosen:
            worker.expect_ready()
        before = self.metrics()
        for worker in chosen:
            worker.go()
        runs = [worker.result(JobRun) for worker in chosen]
        after = self.metrics()
        spent = {
            name: after.get(name, 0.0) - before.get(name, 0.0)
            for name in (_DECODE_TOKENS, _DECODE_SECONDS, _DECODE_CPU_SECONDS)
        }
        return HeldRuns(
            runs=runs,
            trunk_tokens=spent[_DECODE_TOKENS],
            trunk_s=spent[_DECODE_SECONDS],
            trunk_cpu_s=spent[_DECODE_CPU_SECONDS],
        )

    def metrics(self) -> dict[str, float]:
        """The server's counters now."""
        url = f"http://127.0.0.1:{self._server.health_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return parse_metrics(reply.read().decode())

    def counters(self) -> Counters:
        """Bytes at the sockets of all clients."""
        assert self._links is not None
        return self._links.counters()

    def set_link(self, link: str) -> None:
        """Change the links under the open connections."""
        assert self._links is not None
        self._links.set_link(LINK_PROFILES[link])

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open_clients(self) -> None:
        count = len(self._workers)
        ports = [self._server.port] * count if self._links is None else self._links.ports
        for worker, port, name in zip(self._workers, ports, owner_names(count), strict=True):
            worker.send(Opening(request=self._request(port, name), draft_model=self._draft_model))
        for worker in self._workers:
            worker.expect_ready()
            worker.go()

    def _request(self, port: int, name: str) -> SplitRequest:
        return SplitRequest(
            address=f"127.0.0.1:{port}",
            model_folder=str(self.model.folder),
            lower=self.model.lower,
            upper=self.model.upper,
            kit=str(self._kits.clients[name]),
            codec=self._codec,
            rows=[],
        )


class Worlds:
    """Opens worlds; a context manager.

    Args:
        kits: certificates; one of `owner_names` for each client.
        num_shared: None closes a world after its use. Else worlds of so many clients stay open and
            are used again by whoever asks for the same model and link: quicker, but then other
            processes are there while one is measured.
    """

    def __init__(self, kits: LocalFolders, num_shared: int | None = None) -> None:
        self._kits, self._num_shared = kits, num_shared
        self._shared: dict[tuple[str, str | None], World] = {}
        self._stack = ExitStack()

    @contextmanager
    def open(
        self,
        model: ServedModel,
        num_threads: int,
        *,
        num_clients: int = 1,
        codec: str = "raw",
        link: str | None = None,
        client_threads: int | None = None,
        draft_model: str | None = None,
    ) -> Iterator[World]:
        """A world as `World` describes it."""
        key = (model.name, link)
        if key in self._shared:
            yield self._shared[key]
            return
        world = World(
            model,
            self._kits,
            num_threads,
            num_clients=self._num_shared or num_clients,
            codec=codec,
            link=link,
            client_threads=client_threads,
            draft_model=draft_model,
        )
        if self._num_shared is None:
            with world:
                yield world
        else:
            self._shared[key] = self._stack.enter_context(world)
            yield world

    def __enter__(self) -> "Worlds":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def served_model(name: str, folder: Path, lower: int, upper: int | None = None) -> ServedModel:
    """A model folder and its cut; `upper` None leaves as many blocks above as below."""
    config = AutoConfig.from_pretrained(folder)
    return ServedModel(
        name=name,
        folder=folder,
        lower=lower,
        upper=config.num_hidden_layers - lower if upper is None else upper,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
    )


def owner_names(count: int) -> list[str]:
    """Names of the owners in certificates, in order."""
    return [f"owner{number}" for number in range(count)]


def parse_metrics(text: str) -> dict[str, float]:
    """Values by name of Prometheus' text format; those that differ in labels alone are summed."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{", 1)[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values
