"""SPF at several ratios: score, trainable values, optimizer memory, peak memory, time of a step.

`python -m benchmarks.spf --json`. All contestants take every step one after the other on the same
rows, so that a noisy machine is noisy for all; memory is measured in a process each. `dense` is
full fine-tuning of the same layers by plain autograd, which a mask on its gradients would not make
cheaper. What a contestant is, says `spf_subject`.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.isolate import run_isolated
from benchmarks.report import Arguments, emit, median, parse_arguments, print_table
from benchmarks.spf_memory import SpfMemory, SpfRequest
from benchmarks.spf_subject import DENSE, Contestant, Task, load_model, make_task

__all__ = ["RATIOS", "SIZES", "Found", "Sizes", "compare", "main"]

RATIOS: tuple[float | str, ...] = (0.125, 0.25, 0.5, 0.625, 1.0, DENSE)
_SMOKE_MEMORY = (0.125, 1.0, DENSE)
"""Each is a process that takes seconds to start."""
_MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    num_steps: int
    rows_per_step: int
    num_questions: int
    lr: float


SIZES = {
    "standard": Sizes(num_steps=20, rows_per_step=8, num_questions=100, lr=1e-4),
    "smoke": Sizes(num_steps=3, rows_per_step=4, num_questions=20, lr=1e-3),
}


@dataclass(kw_only=True)
class Found:
    """One contestant's results."""

    name: str
    num_trainable: int
    optimizer_bytes: int = 0
    step_s: list[float] = field(default_factory=list)
    step_cpu_s: list[float] = field(default_factory=list)
    """Processor seconds of all threads: what others do on the machine does not count."""
    losses: list[float] = field(default_factory=list)
    score: float = 0.0
    memory: SpfMemory | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Above what the loaded model needed."""
        return None if self.memory is None else self.memory.peak_bytes - self.memory.loaded_bytes


def compare(task: Task, sizes: Sizes, ratios: Sequence[float | str] = RATIOS) -> list[Found]:
    """Train all contestants, step by step in turns, and score them."""
    shared = load_model(task.model)
    contestants = [
        Contestant(load_model(task.model) if ratio == DENSE else shared, ratio, sizes.lr)
        for ratio in ratios
    ]
    found = [Found(name=c.name, num_trainable=c.num_trainable) for c in contestants]
    for step in range(sizes.num_steps):
        rows = [
            task.train[(step * sizes.rows_per_step + index) % len(task.train)]
            for index in range(sizes.rows_per_step)
        ]
        for one, result in zip(contestants, found, strict=True):
            one.use()
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            result.losses.append(one.step(rows))
            result.step_s.append(time.perf_counter() - began_s)
            result.step_cpu_s.append(time.process_time() - began_cpu_s)
    for one, result in zip(contestants, found, strict=True):
        one.use()
        result.score = one.model.score(task.questions)
        result.optimizer_bytes = one.optimizer_bytes
    return found


def _measure_memory(
    found: Sequence[Found], task: Task, sizes: Sizes, smoke_folder: Path | None, threads: int
) -> None:
    for result, ratio in zip(found, RATIOS, strict=True):
        if smoke_folder is not None and ratio not in _SMOKE_MEMORY:
            continue
        request = SpfRequest(
            model=str(task.model),
            ratio=ratio,
            num_rows=sizes.rows_per_step,
            smoke_folder=None if smoke_folder is None else str(smoke_folder),
        )
        result.memory = run_isolated(
            "benchmarks.spf_memory", request, SpfMemory, num_threads=threads
        )


def _table(found: Sequence[Found], base_score: float) -> None:
    columns = (
        "learns", "score", "trainable, M", "optimizer, MB", "peak over model, MB",
        "kept for backward, MB", "step, s", "step, CPU s", "last loss",
    )  # fmt: skip
    rows = []
    for one in found:
        rows.append(
            (
                one.name,
                one.score,
                one.num_trainable / 1e6,
                one.optimizer_bytes / _MEGABYTE,
                None if one.peak_bytes is None else one.peak_bytes / _MEGABYTE,
                None if one.memory is None else one.memory.activation_bytes / _MEGABYTE,
                median(one.step_s, skip=1),
                median(one.step_cpu_s, skip=1),
                one.losses[-1],
            )
        )
    print_table(f"SPF; the base model scores {base_score:.4g}", columns, rows)


def _result(
    found: Sequence[Found], base_score: float
) -> dict[str, bool | int | float | str | None]:
    result: dict[str, bool | int | float | str | None] = {"base_score": base_score}
    for one in found:
        name = one.name.replace(" %", "").replace(".", "_")
        result |= {
            f"score_{name}": one.score,
            f"trainable_{name}": one.num_trainable,
            f"optimizer_bytes_{name}": one.optimizer_bytes,
            f"peak_over_model_bytes_{name}": one.peak_bytes,
            f"activation_bytes_{name}": None if one.memory is None else one.memory.activation_bytes,
            f"step_s_{name}": median(one.step_s, skip=1),
            f"step_cpu_s_{name}": median(one.step_cpu_s, skip=1),
        }
    return result


def _run(arguments: Arguments, smoke_folder: Path | None) -> None:
    # Threads that wait for each other would be all that a tiny model's step shows.
    sizes, threads = SIZES[arguments.profile], 1 if arguments.is_smoke else max(arguments.threads)
    torch.set_num_threads(threads)
    num_rows = sizes.num_steps * sizes.rows_per_step
    task = make_task(arguments.model, num_rows, sizes.num_questions, smoke_folder)
    base_score = load_model(task.model).score(task.questions)
    found = compare(task, sizes)
    _measure_memory(found, task, sizes, smoke_folder, threads)
    _table(found, base_score)
    emit(
        {"profile": arguments.profile, "threads": threads, **_result(found, base_score)}, arguments
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    asked = parse_arguments(__doc__.splitlines()[0], arguments)
    if not asked.is_smoke:
        _run(asked, None)
        return
    with tempfile.TemporaryDirectory(prefix="spf-") as folder:
        _run(asked, Path(folder))


if __name__ == "__main__":
    main()
