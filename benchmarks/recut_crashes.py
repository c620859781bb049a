"""Kill -9 both sides at seeded boundaries of re-cuts: old cut or new one, and the same losses.

Run as a process (`isolate.run_isolated`): it forks the sides off itself, so it has no thread and no
link. It measures no time.
"""

import json
import multiprocessing
import random
import signal
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.isolate import answer, read_request
from benchmarks.recovery import make_model
from benchmarks.recut_boundaries import Boundaries
from benchmarks.recut_sides import own, serve
from cutlayer import ClientSettings, ServerSettings
from cutlayer.client.run_state import RunState, StepRecord
from cutlayer.model.moved_blocks import block_of
from cutlayer.model.partition import Cut
from cutlayer.model.tensor_file import read_tensors
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.storage.steps import StepStore

__all__ = ["CrashRequest", "CrashResult", "main"]

_NUM_BLOCKS = 4
_FIRST = Cut(1, 3)
_LONGEST_S = 800.0
_FORK = multiprocessing.get_context("fork")


class CrashRequest(msgspec.Struct, frozen=True, kw_only=True):
    """How much to break."""

    num_steps: int
    num_recuts: int
    num_crashes: int
    seed: int = 0


class CrashResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it."""

    recut_loss_max_rel_diff: float
    """Largest difference of a training loss, with crashes and without, from a run left alone."""
    recut_adapter_max_rel_diff: float
    """The same of the exported adapters, relative to each tensor's largest value."""
    recuts: int
    """That the run without crashes made."""
    crashes: int
    crashes_of_server: int
    mixtures: int
    """Crashes after which client and server did not hold one whole run of one cut."""
    lost_steps: int
    """Steps that the history does not have, or has twice."""


@dataclass
class _World:
    """Files of one run, and its two processes."""

    folder: Path
    model: Path
    plan: Mapping[int, Cut]
    num_steps: int
    port: int = field(default_factory=lambda: _free_port())
    kill_client: "multiprocessing.sharedctypes.Synchronized[int]" = field(
        default_factory=lambda: _FORK.Value("i", -1)
    )
    kill_server: "multiprocessing.sharedctypes.Synchronized[int]" = field(
        default_factory=lambda: _FORK.Value("i", -1)
    )
    most_client: "multiprocessing.sharedctypes.Synchronized[int]" = field(
        default_factory=lambda: _FORK.Value("i", 0)
    )
    most_server: "multiprocessing.sharedctypes.Synchronized[int]" = field(
        default_factory=lambda: _FORK.Value("i", 0)
    )

    @property
    def history(self) -> list[StepRecord]:
        """Of the finished run."""
        data = (self.folder / "history").read_bytes()
        return msgspec.json.decode(data, type=list[StepRecord])

    @property
    def adapter(self) -> dict[str, Tensor]:
        """Exported at its end."""
        state: dict[str, Tensor] = load_file(
            self.folder / "history.adapter" / "adapter_model.safetensors"
        )
        return state

    def start_server(self) -> BaseProcess:
        """In a process of its own."""
        boundaries = Boundaries(self.kill_server, self.most_server)
        process = _FORK.Process(target=serve, args=(self._server(), boundaries), daemon=True)
        process.start()
        return process

    def start_client(self) -> BaseProcess:
        """In a process of its own."""
        boundaries = Boundaries(self.kill_client, self.most_client)
        result = self.folder / "history"
        arguments = (self.client(), self.plan, boundaries, result)
        process = _FORK.Process(target=own, args=arguments, daemon=True)
        process.start()
        return process

    def client(self) -> ClientSettings:
        """The owner's settings."""
        table = {
            "model": {"path": str(self.model), "lower": _FIRST.lower, "upper": _FIRST.upper},
            "connection": {
                "address": f"127.0.0.1:{self.port}",
                "plaintext": True,
                "codec": "raw",
            },
            "privacy": {"mechanism": "none"},
            "run": {"folder": str(self.folder / "run")},
            "adapter": {"rank": 2, "alpha": 4},
            "data": {
                "train": str(self.folder / "rows.jsonl"),
                "prompt_template": "{text}:",
                "completion_template": " {topic}",
                "chat_template": False,
            },
            "train": {
                "steps": self.num_steps,
                "rows_per_step": 2,
                "lr": 0.02,
                "clip_norm": 0,
                "save_every": 3,
            },
        }
        return parse_settings(ClientSettings, table, "the crash test")

    def _server(self) -> ServerSettings:
        table = {
            "model": {"path": str(self.model), "lower": 0, "upper": _NUM_BLOCKS},
            "listen": {"address": f"127.0.0.1:{self.port}", "plaintext": True},
            "state": {"folder": str(self.folder / "server")},
        }
        return parse_settings(ServerSettings, table, "the crash test")


@dataclass
class _Count:
    """What happened in one run."""

    crashes: int = 0
    of_server: int = 0
    mixtures: int = 0


def main() -> None:
    """Answer one `CrashRequest` from stdin."""
    torch.set_num_threads(1)
    request = read_request(CrashRequest)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        work.chmod(0o700)
        answer(_measure(request, work))


def _measure(request: CrashRequest, work: Path) -> CrashResult:
    model = make_model(work / "model")
    plan = _plan(request, request.num_recuts)
    whole = _world(work / "whole", model, {}, request)
    _run(whole, [])
    moved = _world(work / "moved", model, plan, request)
    _run(moved, [])
    # More of them, as a boundary that is drawn too high waits for a re-cut with so many.
    broken = _world(work / "broken", model, _plan(request, 2 * request.num_recuts), request)
    count = _run(broken, _crashes(request, moved))
    steps = [record.step for record in broken.history]
    losses = [_loss_diff(whole, other) for other in (moved, broken)]
    adapters = [_adapter_diff(whole, other) for other in (moved, broken)]
    return CrashResult(
        recut_loss_max_rel_diff=max(losses),
        recut_adapter_max_rel_diff=max(adapters),
        recuts=len(plan),
        crashes=count.crashes,
        crashes_of_server=count.of_server,
        mixtures=count.mixtures,
        lost_steps=len(set(range(1, request.num_steps + 1)) ^ set(steps))
        + len(steps)
        - len(set(steps)),
    )


def _plan(request: CrashRequest, num_recuts: int) -> dict[int, Cut]:
    """By step, spread evenly; no two neighbours the same."""
    draw, cuts = random.Random(request.seed), [_FIRST]
    every = [Cut(a, b) for a in range(_NUM_BLOCKS) for b in range(a + 1, _NUM_BLOCKS + 1)]
    for _ in range(num_recuts):
        cuts.append(draw.choice([cut for cut in every if cut != cuts[-1]]))
    gap = request.num_steps / (num_recuts + 1)
    return {round((index + 1) * gap): cut for index, cut in enumerate(cuts[1:])}


def _crashes(request: CrashRequest, dry: _World) -> list[tuple[str, int]]:
    """Which side ends at which boundary, two of three times the client, which has more of them."""
    draw = random.Random(request.seed + 1)
    found = []
    for number in range(request.num_crashes):
        side = "server" if number % 3 == 2 else "client"
        most = dry.most_server.value if side == "server" else dry.most_client.value
        found.append((side, draw.randrange(most)))
    return found


def _world(folder: Path, model: Path, plan: Mapping[int, Cut], request: CrashRequest) -> _World:
    private_folder(folder)
    rows = [{"text": "ab" * (1 + i % 5), "topic": ("law", "art")[i % 2]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _World(folder=folder, model=model, plan=plan, num_steps=request.num_steps)


def _run(world: _World, crashes: list[tuple[str, int]]) -> _Count:
    """To its end, each killed process started again."""
    count, left = _Count(), list(reversed(crashes))
    _arm(world, left)
    deadline_s = time.monotonic() + _LONGEST_S
    server, client = world.start_server(), world.start_client()
    try:
        while client.exitcode != 0:
            client.join(0.01)
            if time.monotonic() > deadline_s:
                raise RuntimeError("the run with crashes does not end")
            if server.exitcode is not None:
                _require_killed(server)
                count.of_server += 1
                _count(world, count, left)
                server = world.start_server()
            if client.exitcode not in (None, 0):
                _require_killed(client)
                count.mixtures += not _is_whole(world)
                _count(world, count, left)
                client = world.start_client()
    finally:
        for process in (client, server):
            process.kill()
            process.join()
    count.mixtures += not _is_whole(world)
    return count


def _count(world: _World, count: _Count, left: list[tuple[str, int]]) -> None:
    count.crashes += 1
    left.pop()
    _arm(world, left)


def _arm(world: _World, left: list[tuple[str, int]]) -> None:
    side, at = left[-1] if left else ("nobody", -1)
    world.kill_client.value = at if side == "client" else -1
    world.kill_server.value = at if side == "server" else -1


def _require_killed(process: BaseProcess) -> None:
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"a side ended by itself with status {process.exitcode}")


def _is_whole(world: _World) -> bool:
    """Whether both sides hold one run: one cut, one step, every block's adapter exactly once."""
    state = RunState(world.client().run)
    try:
        cut, steps = state.cut or _FIRST, state.saved_steps()
        if not steps:
            return True
        tensors = state.load(steps[-1]).tensors
        run_id = state.run_id
    finally:
        state.close()
    mine = {**tensors["head"], **tensors["tail"]}
    folders = list((world.folder / "server" / "runs").glob(f"*/{run_id}"))
    if not folders:
        return steps[-1] == 0
    store = StepStore(folders[0])
    if steps[-1] not in store.steps():
        return False
    files = store.load(steps[-1])
    theirs = read_tensors(files, "adapter.safetensors")
    saved = json.loads(files["state.json"])["cut"]
    return (
        saved == [cut.lower, cut.upper]
        and {block_of(key) for key in theirs} == set(cut.trunk)
        and {block_of(key) for key in mine} == set(range(_NUM_BLOCKS)) - set(cut.trunk)
        and not mine.keys() & theirs.keys()
    )


def _loss_diff(first: _World, second: _World) -> float:
    pairs = zip(first.history, second.history, strict=True)
    return max(abs(a.loss - b.loss) / abs(a.loss) for a, b in pairs)


def _adapter_diff(first: _World, second: _World) -> float:
    one, other = first.adapter, second.adapter
    if one.keys() != other.keys():
        return float("inf")
    return max(
        float((one[key] - other[key]).abs().max() / one[key].abs().max().clamp_min(1e-12))
        for key in one
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
