"""How close a setting without trusted hardware comes: little recovered, much of the task kept.

    python -m benchmarks.pareto --json

One task (the topic of a news article, whose text is private), fine-tuned in each setting over the
product's own path and then attacked; beside them the control: the same head and tail trained
without the trunk (y = h). A setting counts only where it beats the control by more than both error
bars. Every setting is kept in the folder, so a run that was stopped goes on.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks.pareto_control import control_accuracy
from benchmarks.pareto_task import Task, make_task
from benchmarks.report import Arguments, Value, emit, parse_arguments, print_table
from cutlayer.audit.attack import Aim
from cutlayer.audit.audit import Audit
from cutlayer.audit.results import Trial

__all__ = ["Setting", "main", "summary"]

_POINTS, _RECOVERY = 0.02, 0.10
_Z = 1.96
_FOLDER = Path("build/pareto")
_COLUMNS = ("setting", "steps", "accuracy", "recovery", "attack", "prior", "control", "counts")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the plane."""

    lower: int
    upper: int
    label: str
    steps: int
    """Of training; the control has its own."""
    accuracy: float
    """On held-out rows."""
    num_rows: int
    recovery: float | None
    """Of the strongest attack on tokens; None where none ran."""
    attack: str | None
    """That attack."""
    by_attack: Mapping[str, float]
    """Attacks on tokens that ran to a measurement."""
    not_run: Mapping[str, str]
    """The others, and why: a lack of time measures nothing."""
    prior: float | None
    control: float
    """Accuracy of the same head and tail without the trunk."""
    is_open: bool
    """Nothing is withheld and nothing noised: the reference."""

    @property
    def beats_control(self) -> bool:
        """By more than the error bars of both."""
        return self.accuracy - self.control > self.error + _error(self.control, self.num_rows)

    @property
    def error(self) -> float:
        """Half the 95 % interval of the accuracy."""
        return _error(self.accuracy, self.num_rows)


def summary(settings: Sequence[Setting], reference: float) -> dict[str, Value]:
    """The two questions of the plane, over settings that beat their control.

    Args:
        settings: what was tried.
        reference: accuracy without noise and with nothing withheld.
    """
    counted = [one for one in settings if one.beats_control]
    near = [
        (one.recovery, one)
        for one in counted
        if one.recovery is not None and reference - one.accuracy <= _POINTS + 1e-9
    ]
    hidden = [one for one in counted if one.recovery is not None and one.recovery <= _RECOVERY]
    recovery, best_near = min(near, key=lambda pair: pair[0], default=(None, None))
    best_hidden = max(hidden, key=lambda one: one.accuracy, default=None)
    return {
        "reference_accuracy": reference,
        "recovery": None if recovery is None else round(recovery, 4),
        "recovery_setting": None if best_near is None else best_near.label,
        "utility_loss": None
        if best_hidden is None
        else round(max(0.0, reference - best_hidden.accuracy), 4),
        "utility_loss_setting": None if best_hidden is None else best_hidden.label,
        "is_reached": recovery is not None and recovery <= _RECOVERY,
        "num_settings": len(settings),
        "num_beating_control": len(counted),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every setting, print the plane."""
    asked = parse_arguments(__doc__ or "", arguments)
    folder = None if asked.is_smoke else _FOLDER
    task = make_task(folder, is_smoke=asked.is_smoke, threads=max(asked.threads))
    settings: list[Setting] = []
    for point, plan in zip(task.points, task.plans(), strict=True):
        steps = point.num_times * task.sizes.steps
        for trial in Audit(plan, _Quiet()).run().trials:
            settings.append(_setting(trial, steps, _control(task, trial)))
    reference = max(one.accuracy for one in settings if one.is_open)
    result = summary(settings, reference)
    print_table("pareto", _COLUMNS, [_row(one) for one in settings])
    emit(result, Arguments(profile=asked.profile, model=None, as_json=False, threads=()))
    if asked.as_json:
        table = [{**asdict(one), "beats_control": one.beats_control} for one in settings]
        print(json.dumps({**result, "settings": table}), flush=True)


class _Quiet:
    """Says what is done, no more."""

    def begin(self, number: int, total: int | None, label: str) -> None:
        """Its name."""
        print(f"setting {label}", flush=True)

    def progress(self, what: str, share: float) -> None:
        """Nothing is shown within a setting."""

    def finish(self, trial: Trial, was_done: bool) -> None:
        """Its times."""
        other = trial.seconds - trial.attack_seconds
        print(
            f"  {trial.tune_seconds:.0f} s tuned, {other:.0f} s recorded and scored, "
            f"{trial.attack_seconds:.0f} s attacked",
            flush=True,
        )


def _control(task: Task, trial: Trial) -> float:
    cut = (trial.spec.lower, trial.spec.upper)
    path = task.folder / f"control-{cut[0]}-{cut[1]}.json"
    if not path.exists():
        path.write_bytes(msgspec.json.encode(control_accuracy(task, cut)))
    return msgspec.json.decode(path.read_bytes(), type=float)


def _setting(trial: Trial, steps: int, control: float) -> Setting:
    assert trial.utility is not None
    assert trial.utility.accuracy is not None
    by_attack = {
        one.attack: round(one.recovery.value, 4)
        for one in trial.attacks
        if one.recovery is not None and one.aim is Aim.TOKENS
    }
    return Setting(
        lower=trial.spec.lower,
        upper=trial.spec.upper,
        label=trial.label,
        steps=steps,
        accuracy=trial.utility.accuracy,
        num_rows=trial.utility.num_rows,
        recovery=trial.recovery,
        attack=None if trial.worst is None else trial.worst.attack,
        by_attack=by_attack,
        not_run={one.attack: one.skipped for one in trial.attacks if one.skipped is not None},
        prior=trial.prior,
        control=control,
        is_open=trial.spec.rule.mechanism == "none" and trial.spec.withhold == "none",
    )


def _error(share: float, num: int) -> float:
    return _Z * math.sqrt(max(share * (1 - share), 0.25 / max(1, num)) / max(1, num))


def _row(one: Setting) -> list[str]:
    prior = "-" if one.prior is None else f"{one.prior:.3f}"
    return [
        one.label,
        str(one.steps),
        f"{one.accuracy:.3f} ± {one.error:.3f}",
        "-" if one.recovery is None else f"{one.recovery:.3f}",
        one.attack or "-",
        prior,
        f"{one.control:.3f}",
        "yes" if one.beats_control else "no",
    ]


if __name__ == "__main__":
    main()
