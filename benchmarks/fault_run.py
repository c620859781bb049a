"""Runs one scenario of the fault campaign and judges it: threads here, or processes.

It chooses no faults (`fault_plan`) and counts nothing (`faults`).
"""

from functools import cache
from pathlib import Path

from benchmarks.fault_evidence import Evidence
from benchmarks.fault_judge import Verdict, judge
from benchmarks.fault_plan import Plan
from benchmarks.fault_processes import run_in_processes
from benchmarks.fault_settings import World
from benchmarks.fault_twin import TWIN_TOLERANCE, Twin, differences, recompute
from benchmarks.fault_witness import witnesses
from benchmarks.fault_world import run_in_threads

__all__ = ["run_and_judge"]

_CHAIN = 3
"""Rounds that differences of the twin add up over."""


def run_and_judge(plan: Plan, folder: Path, model: Path) -> tuple[Verdict, int]:
    """The verdict, and how many of the plan's faults struck.

    Args:
        plan: the scenario.
        folder: private and empty.
        model: model folder.
    """
    world = World(plan=plan, folder=folder, model=model)
    if plan.is_real:
        evidence = run_in_processes(plan, folder, model)
        again = recompute(_twin(model), world, evidence)
        return judge(again, _CHAIN * TWIN_TOLERANCE), len(evidence.happened)
    with witnesses():
        evidence = run_in_threads(plan, folder, model)
    return _with_twin(judge(evidence), world, evidence), len(evidence.happened)


def _with_twin(verdict: Verdict, world: World, evidence: Evidence) -> Verdict:
    """The sums are right; so must be what was summed."""
    if verdict.kind not in ("right", "refused"):
        return verdict
    wrong = tuple(differences(_twin(world.model), world, evidence))
    return Verdict(kind="wrong", reasons=wrong) if wrong else verdict


@cache
def _twin(model: Path) -> Twin:
    return Twin(model)
