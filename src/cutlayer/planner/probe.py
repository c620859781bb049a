"""Which cut a task needs: brief fine-tunes at several cuts, all on this machine.

The client, the server, the noise and what trains are the owner's own; nothing leaves, and no budget
is spent. It decides how long and how often to run (`probe_run` runs) and predicts no time of a real
run: both sides share this machine.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from cutlayer.planner.probe_run import Bench, Cost, Tuned, make_bench

__all__ = ["ProbeBudget", "ProbeResult", "Sensitivity", "probe", "sensitivity"]

_TOLERANCE = 0.02
"""Share of the least loss by which another counts as no worse."""


@dataclass(frozen=True, kw_only=True)
class ProbeBudget:
    """How much is spent on a probe."""

    steps: int = 20
    """Optimizer steps of each fine-tune; fewer where the time does not allow them."""
    seconds: float | None = None
    """Wall-clock seconds of all of it; None has no limit."""
    seeds: int = 1
    """Fine-tunes of each cut, with other rows first and other noise; fewer where time runs out."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"probe steps={self.steps}: at least one step is needed")
        if self.seeds < 1:
            raise ConfigError(f"probe seeds={self.seeds}: at least one is needed")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"probe seconds={self.seconds}: choose more than 0")


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a task made of one cut."""

    cut: Cut
    untuned_loss: float
    """Held-out loss before the first step, in nats per scored token, noise included."""
    losses: tuple[float, ...]
    """Held-out loss after the last step, one per seed."""
    num_steps: int
    """Steps of each fine-tune."""
    num_rows: int
    """Held-out rows."""
    seconds: float
    """Wall clock of all runs of this cut, both sides on this machine."""

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return fmean(self.losses)

    @property
    def error(self) -> float | None:
        """Standard error of that mean; None of one seed."""
        if len(self.losses) < 2:
            return None
        return stdev(self.losses) / math.sqrt(len(self.losses))

    @property
    def gain(self) -> float:
        """By how much the fine-tune lowered the loss, in nats."""
        return self.untuned_loss - self.loss


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """How much a task cares where it is cut."""

    best: ProbeResult
    """The least loss."""
    needed: ProbeResult
    """The fewest blocks at the client among those that are no worse than the best."""
    spread: float
    """Greatest mean loss less the least, in nats."""
    tolerance: float
    """Differences up to here count as none, in nats."""
    sentence: str
    """The same in plain words."""

    @property
    def is_sensitive(self) -> bool:
        """Whether some cut is worse than another by more than the tolerance."""
        return self.spread > self.tolerance


Watch = Callable[[str], None]
"""Told what goes on, a line at a time."""


def probe(
    client: ClientSettings,
    data: Path,
    cuts: Sequence[Cut],
    budget: ProbeBudget,
    watch: Watch = lambda line: None,
) -> tuple[ProbeResult, ...]:
    """Fine-tune briefly at every cut, and score the same held-out rows before and after.

    Args:
        client: the owner's settings: model, noise, adapter, form of the rows, how to train.
        data: rows in the form that `client.data` describes.
        cuts: to try; one result each, in this order, whatever is given twice once.
        budget: steps, seconds, seeds.
        watch: told each run as it ends.

    Raises:
        ConfigError: no cut, a cut that the model does not have, settings without [data], or too
            few seconds for one step at each cut.
        DataError: the rows cannot be read, or leave none to score.
    """
    chosen = tuple(dict.fromkeys(cuts))
    if not chosen:
        raise ConfigError("there is no cut to probe; give at least one")
    bench = make_bench(client, data, chosen)
    return _Probe(bench=bench, budget=budget, watch=watch).run(chosen)


def sensitivity(results: Sequence[ProbeResult]) -> Sensitivity:
    """What the results say of the task.

    Two losses are told apart where they differ by more than two standard errors of their
    difference, or by 2 percent where one seed alone ran.

    Args:
        results: at least one.
    """
    if not results:
        raise ConfigError("nothing was probed")
    best = min(results, key=lambda one: one.loss)
    tolerance = _tolerance(results, best)
    good = [one for one in results if one.loss - best.loss <= tolerance]
    # The widest trunk leaves the fewest blocks here; of equals the one that cuts earlier.
    needed = min(good, key=lambda one: (one.cut.lower - one.cut.upper, one.cut.lower))
    spread = max(one.loss for one in results) - best.loss
    return Sensitivity(
        best=best,
        needed=needed,
        spread=spread,
        tolerance=tolerance,
        sentence=_sentence(results, needed, spread, tolerance),
    )


@dataclass(kw_only=True)
class _Probe:
    """One probe under way."""

    bench: Bench
    budget: ProbeBudget
    watch: Watch
    clock_s: Callable[[], float] = time.monotonic
    tuned: dict[Cut, list[Tuned]] = field(default_factory=dict)
    began_s: float = 0.0

    def run(self, cuts: tuple[Cut, ...]) -> tuple[ProbeResult, ...]:
        self.began_s = self.clock_s()
        costs = {cut: self._measured(cut, cuts) for cut in cuts}
        num_steps = self._num_steps(list(costs.values()))
        round_s = sum(cost.of_run(num_steps) for cost in costs.values())
        for seed in range(self.budget.seeds):
            # Whole rounds alone: every cut has seen the same seeds.
            if seed and self._left_s() < round_s:
                self.watch(f"no time for seed {seed + 1} of {self.budget.seeds}")
                break
            for cut in cuts:
                self._tune(cut, seed, num_steps)
        return tuple(self._result(cut, costs[cut], num_steps) for cut in cuts)

    def _measured(self, cut: Cut, cuts: Sequence[Cut]) -> Cost:
        """The untuned loss, and how long things take here."""
        cost = self.bench.measure(cut)
        self.watch(f"cut {cut.lower}:{cut.upper} untuned: loss {cost.untuned_loss:.4f}")
        if self._left_s() <= 0:
            self._refuse(2 * len(cuts) * cost.seconds)
        return cost

    def _tune(self, cut: Cut, seed: int, num_steps: int) -> None:
        tuned = self.bench.tune(cut, seed, num_steps)
        self.tuned.setdefault(cut, []).append(tuned)
        self.watch(
            f"cut {cut.lower}:{cut.upper} seed {seed + 1}: loss {tuned.loss:.4f} after "
            f"{num_steps} steps, {tuned.seconds:.1f} s"
        )

    def _num_steps(self, costs: Sequence[Cost]) -> int:
        """As many as wanted, or as the time allows all cuts alike."""
        left_s = self._left_s() - sum(cost.of_run(0) for cost in costs)
        step_s = sum(cost.step_s for cost in costs)
        if left_s >= self.budget.steps * step_s:
            return self.budget.steps
        num_steps = math.floor(left_s / step_s)
        if num_steps < 1:
            self._refuse(sum(cost.seconds + cost.of_run(1) for cost in costs))
        self.watch(f"time for {num_steps} of {self.budget.steps} steps")
        return num_steps

    def _left_s(self) -> float:
        if self.budget.seconds is None:
            return math.inf
        return self.began_s + self.budget.seconds - self.clock_s()

    def _refuse(self, needed_s: float) -> None:
        raise ConfigError(
            f"probe seconds={self.budget.seconds:g} is too short for one step at each cut; give at "
            f"least {math.ceil(1.2 * needed_s)} seconds, fewer cuts or fewer rows per step"
        )

    def _result(self, cut: Cut, cost: Cost, num_steps: int) -> ProbeResult:
        tuned = self.tuned[cut]
        return ProbeResult(
            cut=cut,
            untuned_loss=cost.untuned_loss,
            losses=tuple(one.loss for one in tuned),
            num_steps=num_steps,
            num_rows=self.bench.num_heldout,
            seconds=cost.seconds + sum(one.seconds for one in tuned),
        )


def _tolerance(results: Sequence[ProbeResult], best: ProbeResult) -> float:
    errors = [one.error for one in results]
    known = [error for error in errors if error is not None]
    if len(known) < len(results):
        return _TOLERANCE * abs(best.loss)
    return 2 * math.sqrt(2) * max(known)


def _sentence(
    results: Sequence[ProbeResult], needed: ProbeResult, spread: float, tolerance: float
) -> str:
    about = f"after {needed.num_steps} steps, {needed.num_rows} held-out rows"
    if len(results) == 1:
        return f"one cut alone was probed: loss {needed.loss:.4f} {about}"
    cut = f"{needed.cut.lower}:{needed.cut.upper}"
    if spread <= tolerance:
        return (
            f"this task does not care where it is cut: the losses differ by {spread:.4f} "
            f"({about}); {cut} has the fewest blocks at the client"
        )
    return (
        f"this task needs {cut} or more blocks at the client: loss {needed.loss:.4f}, and up to "
        f"{spread:.4f} more elsewhere ({about})"
    )
