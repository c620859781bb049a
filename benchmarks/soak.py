"""Soak: hundreds of sessions opened, idle, resumed, cancelled at random; no leak, no wrong token.

A real trunk server with little room for caches and a short time to live, a client process with
--sessions sessions of its own, and one with a quarter as many conversations over one engine. Each
stream's tokens are compared with its solo run. Memory is compared after everything was closed:
behind a first phase, which warms up, and behind the last. Prints a table and one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import print_table
from benchmarks.soak_client import SoakPhase, SoakRun, SoakSetup
from benchmarks.soak_plan import make_prompts
from benchmarks.soak_server import ServerMemory, ServerPort
from benchmarks.split import ServeRequest, Setting, SplitRequest, make_kits
from benchmarks.subjects import write_tiny_llama
from benchmarks.workers import Worker
from cutlayer.identity.provision import LocalFolders

__all__ = ["main"]

Value = bool | int | float | str
_OWNERS = ("owner0", "owner1")
_LOWER, _UPPER, _VOCABULARY = 2, 4, 256
_NUM_PROMPTS, _MAX_PROMPT = 24, 40
_CACHE_BYTES_PER_SESSION = 12_000
"""About a third of what a session's row takes: eviction and CacheFull are everyday."""
_TTL_S = 6.0
"""Sessions that idle longer are forgotten by the server, and replayed."""
_WARM_SHARE, _LEAST_WARM_S = 0.1, 5.0


@dataclass(frozen=True, kw_only=True)
class _Options:
    minutes: float
    sessions: int
    seed: int
    as_json: bool


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """What happened in one phase, and what was held after it."""

    runs: list[SoakRun]
    """Of the sessions' client and the conversations' client."""
    server: ServerMemory


def _parse(arguments: Sequence[str] | None) -> _Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", choices=("smoke", "standard"), default="standard")
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    found = parser.parse_args(arguments)
    if found.profile == "smoke":
        found.minutes, found.sessions = min(found.minutes, 0.1), min(found.sessions, 24)
    return _Options(
        minutes=found.minutes, sessions=found.sessions, seed=found.seed, as_json=found.json
    )


class _World:
    """The three processes; a context manager through its stack."""

    def __init__(self, options: _Options, work: Path, stack: ExitStack) -> None:
        self._model = write_tiny_llama(work / "model", vocab_size=_VOCABULARY)
        kits = make_kits(work / "kits", _OWNERS)
        self._server = self._start("benchmarks.soak_server", stack)
        self._server.send(_serve_request(self._model, kits, work / "state", options.sessions))
        port = self._server.result(ServerPort).port
        counts = (options.sessions, max(1, options.sessions // 4))
        self._clients = []
        for name, count in zip(_OWNERS, counts, strict=True):
            client = self._start("benchmarks.soak_client", stack)
            client.send(_client_request(self._model, kits, name, port))
            prompts = make_prompts(options.seed, _NUM_PROMPTS, _VOCABULARY, _MAX_PROMPT)
            has_engine = name == _OWNERS[1]
            client.send(SoakSetup(prompts=prompts, count=count, has_engine=has_engine))
            # One after the other: a solo run is alone.
            client.expect_ready()
            client.go()
            self._clients.append(client)

    def phase(self, seconds: float, seed: int) -> _Phase:
        """Both clients at once; then, when all must be forgotten, what each side holds."""
        for number, client in enumerate(self._clients):
            client.send(SoakPhase(seconds=seconds, seed=seed + number))
        runs = [client.result(SoakRun) for client in self._clients]
        # Sessions that a client left open end with their time to live.
        time.sleep(_TTL_S + 1.5)
        self._server.go()
        return _Phase(runs=runs, server=self._server.result(ServerMemory))

    def _start(self, module: str, stack: ExitStack) -> Worker:
        worker = Worker(module, num_threads=1)
        stack.callback(worker.close)
        return worker


def _serve_request(model: Path, kits: LocalFolders, state: Path, sessions: int) -> ServeRequest:
    limits: dict[str, Setting] = {
        "max_cache_bytes": sessions * _CACHE_BYTES_PER_SESSION,
        "max_client_cache_bytes": sessions * _CACHE_BYTES_PER_SESSION,
        "max_client_sessions": 2 * sessions,
        "session_ttl_s": _TTL_S,
        "evict_after_s": 0.2,
    }
    return ServeRequest(
        model_folder=str(model),
        lower=_LOWER,
        upper=_UPPER,
        kit=str(kits.server),
        state=str(state),
        extra={"limits": limits},
    )


def _client_request(model: Path, kits: LocalFolders, name: str, port: int) -> SplitRequest:
    return SplitRequest(
        address=f"127.0.0.1:{port}",
        model_folder=str(model),
        lower=_LOWER,
        upper=_UPPER,
        kit=str(kits.clients[name]),
        codec="raw",
        rows=[],
    )


def _result(options: _Options, first: _Phase, last: _Phase) -> dict[str, Value]:
    growths = [
        last.server.resident_bytes - first.server.resident_bytes,
        *(
            after.resident_bytes - before.resident_bytes
            for before, after in zip(first.runs, last.runs, strict=True)
        ),
    ]
    runs = [*first.runs, *last.runs]
    return {
        "wrong_streams": sum(run.num_wrong for run in runs),
        "rss_growth_bytes": max(growths),
        "rss_growth_bytes_server": growths[0],
        "rss_growth_bytes_sessions": growths[1],
        "rss_growth_bytes_engine": growths[2],
        "streams": sum(run.num_streams for run in runs),
        "finished": sum(run.num_finished for run in runs),
        "cancelled": sum(run.num_cancelled for run in runs),
        "resumed": sum(run.num_resumed for run in runs),
        "replays": sum(run.num_replays for run in runs),
        "cache_full": sum(run.num_cache_full for run in runs),
        "evictions": last.server.num_evictions,
        "tokens": sum(run.num_tokens for run in runs),
        "sessions_left": last.server.num_sessions,
        "sessions": options.sessions,
        "minutes": options.minutes,
        "seed": options.seed,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Value]:
    """Run, compare, print."""
    options = _parse(arguments)
    seconds = 60 * options.minutes
    warm_s = max(_LEAST_WARM_S, _WARM_SHARE * seconds)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        world = _World(options, Path(name), stack)
        first = world.phase(warm_s, options.seed)
        last = world.phase(seconds, options.seed + 100)
    result = _result(options, first, last)
    print_table("soak", ("key", "value"), [(key, str(value)) for key, value in result.items()])
    if options.as_json:
        print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
