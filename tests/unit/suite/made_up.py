"""Made-up results, as a suite would keep them."""

import hashlib
from collections.abc import Sequence

import numpy as np

from cutlayer.suite.result import Origin, RunResult
from cutlayer.suite.spec import Method, RunSpec, Sizes

SIZES = Sizes(train_rows=120, test_rows=300, steps=30, rows_per_step=8, micro_batch_rows=4, lr=1e-3)
ORIGIN = Origin(
    command="cutlayer eval suite --profile small --only topics",
    commit="0123abc",
    versions={"torch": "2.13", "python": "3.11"},
    machine="2 cores, 24 GB, 2 threads",
    began="2026-11-22T00:00:00Z",
)


def spec(method: Method, seed: int = 0, **more: object) -> RunSpec:
    """A run on topics; `more` are fields of `RunSpec`."""
    fields = {"task": "topics", "sizes": SIZES, **more}
    return RunSpec(method=method, seed=seed, **fields)  # type: ignore[arg-type]


def result(run: RunSpec, items: Sequence[float] = (), **more: object) -> RunResult:
    """A run with these scores; `more` are fields of `RunResult`."""
    values = tuple(float(item) for item in items)
    mean = sum(values) / len(values) if values else 0.0
    fields = {
        "metrics": {"accuracy": mean} if values else {},
        "items": {"accuracy": values} if values else {},
        "questions_digest": "all",
        "seconds": 61.0,
        **more,
    }
    return RunResult(spec=run, origin=ORIGIN, **fields)  # type: ignore[arg-type]


def choices(
    run: RunSpec, share_right: float, num_questions: int = 300, **more: object
) -> RunResult:
    """A run that chose among three answers, right with the given share; the same every time."""
    name = f"{run.task}{run.seed}{share_right}".encode()
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(name).digest()[:4]))
    right = generator.random(num_questions) < share_right
    log_likelihoods = tuple((-1.0, -2.0, -3.0) if yes else (-2.0, -1.0, -3.0) for yes in right)
    fields = {
        "chosen": tuple(int(not yes) for yes in right),
        "log_likelihoods": log_likelihoods,
        "losses": tuple(2.0 / (1 + step) for step in range(run.sizes.steps)),
        "train_seconds": 40.0,
        "score_seconds": 20.0,
        "num_train_tokens": 54_321,
        **more,
    }
    return result(run, [float(yes) for yes in right], **fields)


def small_suite() -> list[RunResult]:
    """What a small profile leaves on one task, with cuts and an audit."""
    untuned = [choices(spec(Method.UNTUNED), 0.4, losses=(), train_seconds=0.0)]
    central = [choices(spec(Method.CENTRALISED, seed), 0.9) for seed in range(3)]
    wire = {"bytes_up": 12_345_678, "bytes_down": 12_345_678}
    split = [choices(spec(Method.SPLIT, seed), 0.9, **wire) for seed in range(3)]
    fp8 = [choices(spec(Method.SPLIT, seed, codec="fp8"), 0.89, **wire) for seed in range(3)]
    bf16 = [choices(spec(Method.SPLIT, codec="bf16"), 0.9, **wire)]
    noised = spec(Method.SPLIT, mechanism="gaussian", scale=0.05)
    noise = [choices(noised, 0.7, guarantee="none: no clip", **wire)]
    even = [choices(spec(Method.TOGETHER, owners=4), 0.89, **wire)]
    skew = spec(Method.TOGETHER, owners=4, alpha=0.1, strategy="fedavg", local_steps=5)
    skewed = [choices(skew, 0.6, **wire)]
    return [*untuned, *central, *split, *fp8, *bf16, *noise, *even, *skewed, *cuts()]


def cuts() -> list[RunResult]:
    """Three cuts in processes of their own, audited."""
    found = []
    for p, q in ((1, 1), (3, 3), (1, 5)):
        at = {"head_blocks": p, "tail_blocks": q}
        run = spec(Method.SPLIT, in_processes=True, **at)
        memory = 300_000_000 + 20_000_000 * (p + q)
        found.append(choices(run, 0.88, peak_client_bytes=memory, bytes_up=9_000_000))
        found.append(result(spec(Method.AUDIT, **at), recovery=1.0 / p))
    return found
