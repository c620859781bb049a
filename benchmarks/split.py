"""The product in a benchmark: a real server process, a real client process, mutual TLS.

Both are started through `isolate`, so their threads are their own. The client stops at marks, at
which the parent reads the proxy's counters. It does not compare or print.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from benchmarks.isolate import answer, read_request, start_isolated
from benchmarks.link import Counters, DelayingProxy
from cutlayer import Client, ClientSettings, ServerSettings, TrunkServer
from cutlayer.client.session import Feed
from cutlayer.client.settings import Schedule, TrainSettings
from cutlayer.client.train import Report, Trainer, TrainingData
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import Example
from cutlayer.identity.provision import LocalFolders, local, member_files
from cutlayer.model.optimizer import AdamWSettings
from cutlayer.server.front import TrunkFront
from cutlayer.settings import parse_settings

__all__ = [
    "ServeRequest",
    "Setting",
    "SplitRequest",
    "SplitResult",
    "SplitServer",
    "client_settings",
    "make_kits",
    "new_trainer",
    "run_client",
    "server_settings",
]


Scalar = bool | int | float | str | None
Setting = Scalar | dict[str, Scalar]
"""A key's value, or a section within a section."""


class ServeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the server process is told."""

    model_folder: str
    lower: int
    upper: int
    kit: str
    state: str
    extra: dict[str, dict[str, Setting]] = {}
    """More sections of the server's settings, or keys that replace those of a section."""
    has_metrics: bool = False
    """Serve `/metrics` on a free port."""


class SplitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement by a client process of its own."""

    address: str
    model_folder: str
    lower: int
    upper: int
    kit: str
    codec: str
    rows: list[list[int]]
    """Rows of every training step; for a generation its prompt, alone."""
    steps: int = 0
    """Training steps; 0 means generate."""
    new_tokens: int = 0
    is_head_trained: bool = True
    micro_batch_rows: int | None = None
    in_flight: int = 2
    tee: dict[str, Setting] | None = None
    """The client's section [tee]; None asks the server for no proof."""
    export_folder: str | None = None
    """Write the untrained adapter here, so that the unsplit run starts from the same one."""


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to be: a server or a client."""

    serve: ServeRequest | None = None
    measure: SplitRequest | None = None


class SplitResult(msgspec.Struct, frozen=True, kw_only=True):
    """What each step or token cost at the client."""

    seconds: tuple[float, ...]
    """Of each step, or of the prefill and then each token."""
    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()


class SplitServer:
    """A running trunk server process; a context manager."""

    def __init__(
        self,
        model_folder: Path,
        lower: int,
        upper: int,
        kits: LocalFolders,
        num_threads: int,
        extra: Mapping[str, Mapping[str, Setting]] | None = None,
        *,
        has_metrics: bool = False,
    ) -> None:
        """
        Args:
            model_folder: plain transformers model folder.
            lower: first block of the trunk.
            upper: one past its last block.
            kits: certificates.
            num_threads: torch threads of the server.
            extra: more sections of the server's settings.
            has_metrics: serve `/metrics` on `health_port`.
        """
        self._state = tempfile.TemporaryDirectory()
        request = ServeRequest(
            model_folder=str(model_folder),
            lower=lower,
            upper=upper,
            kit=str(kits.server),
            state=str(Path(self._state.name) / "state"),
            extra={name: dict(section) for name, section in (extra or {}).items()},
            has_metrics=has_metrics,
        )
        self._process = start_isolated("benchmarks.split", _Request(serve=request), num_threads)
        assert self._process.stdout is not None
        ports = json.loads(self._process.stdout.readline())
        self.port, self.health_port = int(ports["port"]), int(ports["health_port"] or 0)

    def __enter__(self) -> "SplitServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate("\n", timeout=30)
        self._state.cleanup()

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._process.pid


def make_kits(folder: Path, names: Sequence[str] = ("owner",)) -> LocalFolders:
    """Certificates for one server and its owners."""
    return local(folder, names=tuple(names))


def run_client(
    request: SplitRequest, proxy: DelayingProxy, num_threads: int
) -> tuple[SplitResult, list[Counters]]:
    """Run a client process; its result, and the counters at its start, and after each step.

    Raises:
        RuntimeError: the process failed; its own words are on stderr.
    """
    counters: list[Counters] = []
    with start_isolated("benchmarks.split", _Request(measure=request), num_threads) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() != "mark":
                return msgspec.json.decode(line, type=SplitResult), counters
            counters.append(proxy.counters())
            process.stdin.write("\n")
            process.stdin.flush()
    raise RuntimeError(f"the client ended with status {process.returncode}")


def _mark() -> None:
    print("mark", flush=True)
    sys.stdin.readline()


def server_settings(request: ServeRequest) -> ServerSettings:
    """A trunk server on a free port of loopback, over mutual TLS."""
    files = member_files(Path(request.kit))
    table: dict[str, dict[str, object]] = {
        "model": _model_of(request),
        "listen": {"address": "127.0.0.1:0", "tls": files.tls},
        "state": {"folder": request.state},
    }
    for name, section in request.extra.items():
        table.setdefault(name, {}).update(section)
    health = {"health_port": 0} if request.has_metrics else {}
    return parse_settings(ServerSettings, {**table, **health}, "benchmark server")


def _model_of(request: ServeRequest | SplitRequest) -> dict[str, object]:
    """Decode steps with one thread, whatever prompts get: these models are small."""
    return {
        "path": request.model_folder,
        "lower": request.lower,
        "upper": request.upper,
        "decode_threads": 1,
    }


def _serve(request: ServeRequest) -> None:
    settings = server_settings(request)
    server = TrunkFront(settings) if settings.replicas.count else TrunkServer(settings)
    server.start()
    ports = {"port": server.port, "health_port": server.health_port}
    print(json.dumps(ports), flush=True)
    sys.stdin.readline()
    server.stop(grace_s=0)


def client_settings(request: SplitRequest, folder: str) -> ClientSettings:
    """An owner without noise; its run lies in `folder`."""
    files = member_files(Path(request.kit))
    parts = ["head", "trunk", "tail"] if request.is_head_trained else ["trunk", "tail"]
    table: dict[str, object] = {
        "model": _model_of(request),
        "connection": {
            "address": request.address,
            "codec": request.codec,
            "tls": files.tls,
        },
        "privacy": {"mechanism": "none"},
        "run": {"folder": str(Path(folder) / "run")},
        "adapter": {"rank": 8, "alpha": 16, "parts": parts},
    }
    if request.tee is not None:
        table["tee"] = request.tee
    return parse_settings(ClientSettings, table, "benchmark client")


def new_trainer(client: Client, request: SplitRequest) -> Trainer:
    """A run over the request's rows, all of them in every step."""
    settings = TrainSettings(
        steps=request.steps,
        rows_per_step=len(request.rows),
        micro_batch_rows=request.micro_batch_rows,
        in_flight=request.in_flight,
        schedule=Schedule.CONSTANT,
        clip_norm=None,
        optimizer=AdamWSettings(weight_decay=0.01),
        save_every=1_000_000,
    )
    examples = [
        Example(tokens=row, labels=[-100, *row[1:]], row_id=index)
        for index, row in enumerate(request.rows)
    ]
    plan = BatchPlan(
        num_rows=len(examples),
        rows_per_step=len(examples),
        steps=request.steps,
        micro_batch_rows=request.micro_batch_rows,
    )
    return client.trainer(TrainingData(train=examples, validation=[], plan=plan), settings)


def _train(client: Client, request: SplitRequest) -> SplitResult:
    seconds: list[float] = []
    trainer = new_trainer(client, request)
    clock = _Clock(seconds)
    history = trainer.run(clock.on_step).history
    if request.export_folder is not None:
        client.export(Path(request.export_folder), step=0)
    return SplitResult(seconds=tuple(seconds), losses=tuple(r.loss for r in history))


class _Clock:
    """Times steps between two reports; what happens at a mark is not counted."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds
        self._begin_s = time.perf_counter()

    def on_step(self, report: Report) -> None:
        self._seconds.append(time.perf_counter() - self._begin_s)
        _mark()
        self._begin_s = time.perf_counter()


def _generate(client: Client, request: SplitRequest) -> SplitResult:
    (prompt,) = request.rows
    client.trunk.hello()
    session = client.session([len(prompt) + request.new_tokens])
    feed, tokens, seconds = list(prompt), [], []
    _mark()
    for _ in range(request.new_tokens):
        begin_s = time.perf_counter()
        (logits_SV,) = session.step([Feed(row=0, tokens=feed)])
        feed = [int(logits_SV[0].argmax())]
        seconds.append(time.perf_counter() - begin_s)
        tokens.extend(feed)
        if len(tokens) == 1:
            _mark()
    _mark()
    session.close()
    return SplitResult(seconds=tuple(seconds), tokens=tuple(tokens))


def _measure(request: SplitRequest) -> SplitResult:
    measured: Callable[[Client, SplitRequest], SplitResult]
    measured = _train if request.steps else _generate
    with (
        tempfile.TemporaryDirectory() as folder,
        Client(client_settings(request, folder)) as client,
    ):
        return measured(client, request)


def main() -> None:
    """Be the server or the client that the request on stdin asks for."""
    request = read_request(_Request)
    if request.serve is not None:
        _serve(request.serve)
    if request.measure is not None:
        answer(_measure(request.measure))


if __name__ == "__main__":
    main()
