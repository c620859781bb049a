"""The fault campaign: seeded scenarios that kill, pause, slow, partition and confuse every role.

`python -m benchmarks.faults --json --scenarios 200`; `--only SEED` repeats one. Each scenario is a
whole federation, from the first JOIN to the last member's end, and must end with the right sum or
with a clear refusal. Scenarios run several at once; how fast they are is not measured.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_plan import Plan, plan_of
from benchmarks.report import Value, emit, parse_arguments

__all__ = ["Outcome", "main", "run_all"]

SMOKE_SCENARIOS = 10
_MEMORY = Path("/dev/shm")
"""Where files cost no disk writes; what is durable is tested elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one scenario."""

    plan: Plan
    verdict: str
    reasons: tuple[str, ...]
    num_struck: int
    """Faults whose moment came."""
    seconds: float


def main(arguments: Sequence[str] | None = None) -> dict[str, Value]:
    """Run the scenarios and count the verdicts."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--scenarios", type=int, help="how many; 200, or 10 for smoke")
    parser.add_argument("--only", type=int, help="the one scenario of this seed")
    parser.add_argument("--workers", type=int, default=3, help="scenarios at once")
    own, rest = parser.parse_known_args(arguments)
    shared = parse_arguments(__doc__ or "", rest)
    count = own.scenarios or (SMOKE_SCENARIOS if shared.is_smoke else 200)
    seeds = range(count) if own.only is None else [own.only]
    began_s = time.monotonic()
    outcomes = list(run_all(seeds, own.workers))
    result = _result(outcomes, time.monotonic() - began_s)
    emit(result, shared)
    return result


def run_all(seeds: Sequence[int], num_workers: int) -> Iterator[Outcome]:
    """Run scenarios in worker processes, and say what each came to."""
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as name:
        model = _make_model(Path(name))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(num_workers, len(seeds)), context, _prepare) as pool:
            futures = [pool.submit(run_one, seed, Path(name), model) for seed in seeds]
            for future in as_completed(futures):
                outcome = future.result()
                _tell(outcome)
                yield outcome


def run_one(seed: int, folder: Path, model: Path) -> Outcome:
    """One scenario in this process, or with processes of its own.

    Args:
        seed: of its plan.
        folder: gets a folder for it, which is removed again.
        model: model folder.
    """
    # Imported here: who only counts verdicts needs no torch.
    from benchmarks.fault_run import run_and_judge

    plan, began_s = plan_of(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{seed}-", dir=folder) as own:
        verdict, num_struck = run_and_judge(plan, Path(own), model)
    return Outcome(
        plan=plan,
        verdict=verdict.kind,
        reasons=verdict.reasons,
        num_struck=num_struck,
        seconds=time.monotonic() - began_s,
    )


def _prepare() -> None:
    """A worker: quiet, one thread."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()


def _make_model(folder: Path) -> Path:
    import transformers

    from benchmarks.recovery import make_model

    transformers.logging.disable_progress_bar()
    return make_model(folder / "model")


def _tell(outcome: Outcome) -> None:
    plan = outcome.plan
    print(f"{plan.seed:>4} {outcome.verdict:<8}{outcome.seconds:5.1f} s  {plan}", file=sys.stderr)
    if outcome.verdict in ("wrong", "hung"):
        for reason in outcome.reasons:
            print(f"       {reason[:500]}", file=sys.stderr)


def _result(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Value]:
    counts = Counter(outcome.verdict for outcome in outcomes)
    bad = sorted(o.plan.seed for o in outcomes if o.verdict in ("wrong", "hung"))
    deeds = Counter(str(fault.deed) for o in outcomes for fault in o.plan.faults)
    return {
        "scenarios": len(outcomes),
        "wrong": counts["wrong"],
        "hung": counts["hung"],
        "refused": counts["refused"],
        "right": counts["right"],
        "bad_seeds": " ".join(map(str, bad)),
        "with_processes": sum(outcome.plan.is_real for outcome in outcomes),
        "faults": sum(deeds.values()),
        "faults_struck": sum(outcome.num_struck for outcome in outcomes),
        **{f"by_{deed}": number for deed, number in sorted(deeds.items())},
        "seconds": round(seconds, 1),
        "slowest_s": round(max((outcome.seconds for outcome in outcomes), default=0.0), 1),
    }


if __name__ == "__main__":
    found = main()
    sys.exit(1 if found["wrong"] or found["hung"] else 0)
