"""The planner's predictions against real processes at cuts that it never measured.

`python -m benchmarks.planner --json`. One server process holds all blocks; `cutlayer plan` measures
blocks, ends and the link; then a client process per cut trains and generates over mutual TLS and an
emulated link. `standard` also compares client memory for 7B shapes (`benchmarks.planner_memory`).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from benchmarks.isolate import process_environment, run_isolated
from benchmarks.link import DelayingProxy, LinkProfile
from benchmarks.planner_client import PlannedClient, PlannedUse, Request
from benchmarks.planner_memory import compare_7b
from benchmarks.report import Arguments, emit, median, parse_arguments, print_table
from benchmarks.split import SplitRequest, SplitServer, client_settings, make_kits
from benchmarks.subjects import equal_rows, subject_folder
from cutlayer.identity.provision import LocalFolders
from cutlayer.simulation.settings_text import settings_text

__all__ = ["Setting", "main", "run_plan"]

_LINK = LinkProfile(rtt_ms=20.0, rate_mbit_per_s=200.0)
_THREADS = 1
"""On each side, so that both fit a machine of two cores."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    num_rows: int
    length: int
    steps: int
    prompt_tokens: int
    budget_s: float
    cuts: tuple[tuple[int, int], ...]
    """Blocks before and after the trunk."""


_SMOKE = Setting(num_rows=4, length=32, steps=6, prompt_tokens=32, budget_s=0.2, cuts=((2, 2),))
_STANDARD = Setting(
    num_rows=4,
    length=128,
    steps=4,
    prompt_tokens=128,
    budget_s=4.0,
    cuts=((1, 1), (2, 3), (5, 5), (10, 2), (3, 12)),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """A model, certificates and a server with a link before it."""

    model: Path
    num_blocks: int
    vocab_size: int
    kits: LocalFolders
    setting: Setting
    proxy: DelayingProxy

    def request(self, head: int, tail: int) -> SplitRequest:
        """A client's cut."""
        setting = self.setting
        return SplitRequest(
            address=self.proxy.address,
            model_folder=str(self.model),
            lower=head,
            upper=self.num_blocks - tail,
            kit=str(self.kits.clients["owner"]),
            codec="bf16",
            rows=equal_rows(setting.num_rows, setting.length, self.vocab_size),
            steps=setting.steps,
            micro_batch_rows=max(1, setting.num_rows // 2),
        )


def run_plan(world: World, folder: Path) -> dict[str, object]:
    """`cutlayer plan` on a client's settings, in a process of its own; its JSON."""
    setting, file = world.setting, folder / "client.toml"
    settings = client_settings(world.request(1, 1), str(folder))
    model = settings.model.model_copy(update={"threads": _THREADS})
    file.write_text(settings_text(settings.model_copy(update={"model": model})))
    work = {
        "mean_length": setting.length,
        "rows_per_step": setting.num_rows,
        "micro_batch_rows": max(1, setting.num_rows // 2),
        "prompt_tokens": setting.prompt_tokens,
        "new_tokens": 12,
    }
    options = [option for key, value in work.items() for option in ("--work", f"{key}={value}")]
    command = [sys.executable, "-m", "cutlayer.cli.main", "plan", str(file), "--json"]
    found = subprocess.run(
        [*command, "--budget-s", str(setting.budget_s), *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=process_environment(_THREADS),
    )
    values: dict[str, object] = json.loads(found.stdout.splitlines()[-1])
    return values


def _measured(world: World, head: int, tail: int) -> PlannedUse:
    request = PlannedClient(
        split=world.request(head, tail), prompt_tokens=world.setting.prompt_tokens
    )
    return run_isolated(
        "benchmarks.planner_client", Request(client=request), PlannedUse, num_threads=_THREADS
    )


@dataclass(frozen=True)
class _Pair:
    cut: str
    what: str
    predicted: float
    measured: float
    """Median."""
    best: float
    """The fastest, which other work on the machine disturbed least."""

    @property
    def error(self) -> float:
        return abs(self.predicted - self.measured) / self.measured

    @property
    def best_error(self) -> float:
        return abs(self.predicted - self.best) / self.best


def _pairs(world: World, plan: Mapping[str, object], head: int, tail: int) -> list[_Pair]:
    setting, use = world.setting, _measured(world, head, tail)
    cuts = plan["cuts"]
    assert isinstance(cuts, list)
    upper = world.num_blocks - tail
    row = next(one for one in cuts if (one["lower"], one["upper"]) == (head, upper))
    thousands = setting.num_rows * setting.length / 1000
    prompt = setting.prompt_tokens / 1000
    traffic, steps = row["training_bytes_per_1000"], (setting.steps - 1) * thousands
    values: dict[str, tuple[float, Sequence[float]]] = {
        "memory MB": (row["client_memory"]["training"] / 1e6, [use.peak_bytes / 1e6]),
        "step s": (row["training_s_per_1000"] * thousands, use.step_s[1:]),
        "prompt s": (row["prefill_s_per_1000"] * prompt, use.prefill_s[1:]),
        "token s": (row["decode_s_per_1000"] / 1000, use.decode_s[2:]),
        "MB up": (traffic["up"] * steps / 1e6, [use.bytes_up / 1e6]),
        "MB down": (traffic["down"] * steps / 1e6, [use.bytes_down / 1e6]),
    }
    return [
        _Pair(f"{head}:{upper}", what, predicted, median(found), min(found))
        for what, (predicted, found) in values.items()
    ]


_TIMES = ("step s", "prompt s", "token s")


def _summary(pairs: list[_Pair]) -> dict[str, bool | int | float | str | None]:
    errors = {what: [p.error for p in pairs if p.what == what] for what in {p.what for p in pairs}}
    times = [error for what in _TIMES for error in errors[what]]
    sent = [*errors["MB up"], *errors["MB down"]]
    return {
        "memory_error": median(errors["memory MB"]),
        "memory_error_max": max(errors["memory MB"]),
        "time_error": median(times),
        "time_error_max": max(times),
        "time_error_best": median([p.best_error for p in pairs if p.what in _TIMES]),
        "load": os.getloadavg()[0],
        **{f"{what[:-2]}_error": median(errors[what]) for what in _TIMES},
        "bytes_error_max": max(sent),
        "cuts": len(errors["memory MB"]),
    }


def _measure(arguments: Arguments, folder: Path) -> dict[str, bool | int | float | str | None]:
    setting = _SMOKE if arguments.is_smoke else _STANDARD
    model = subject_folder(arguments.model, is_smoke=arguments.is_smoke, work_folder=folder)
    config, kits = AutoConfig.from_pretrained(model), make_kits(folder / "kits")
    blocks = int(config.num_hidden_layers)
    with (
        SplitServer(model, 0, blocks, kits, _THREADS) as server,
        DelayingProxy(server.port, _LINK) as proxy,
    ):
        world = World(
            model=model,
            num_blocks=blocks,
            vocab_size=config.vocab_size,
            kits=kits,
            setting=setting,
            proxy=proxy,
        )
        plan = run_plan(world, folder)
        pairs = [pair for cut in setting.cuts for pair in _pairs(world, plan, *cut)]
    print_table(
        "predicted and measured",
        ("cut", "what", "predicted", "measured", "error", "best", "error"),
        [(p.cut, p.what, p.predicted, p.measured, p.error, p.best, p.best_error) for p in pairs],
    )
    return {"profile": arguments.profile, "blocks": blocks, **_summary(pairs)}


def main() -> None:
    """Predict, measure, compare."""
    arguments = parse_arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o700)
        result = _measure(arguments, folder)
        if not arguments.is_smoke:
            result |= compare_7b(folder)
    emit(result, arguments)


if __name__ == "__main__":
    main()
