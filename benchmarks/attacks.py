"""How strong attacks are: without noise, at published scales, and on pure noise (a control).

Prints a table and one JSON line with an object per attack under its registered name. The runs are
the product's own, over a loopback channel; public text is of another kind than the private rows.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attacks_subject import Subject, real_subject, same_norm_noise, tiny_subject
from benchmarks.report import parse_arguments, print_table
from cutlayer.audit.audit import attack_names
from cutlayer.audit.grid import TrialSpec, parse_rule
from cutlayer.audit.live import run_setting
from cutlayer.audit.results import AttackResult
from cutlayer.audit.settings import Phase
from cutlayer.audit.trial import Case, attack_evidence, case_of

__all__ = ["Plan", "main", "measure", "result_of"]

DEEP = "vocabulary_matching"
"""The attack that is tried at every depth."""

Result = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    cut: tuple[int, int]
    """Of all attacks."""
    depths: tuple[int, ...]
    """Blocks of the head for `DEEP`, without noise."""
    scales: tuple[float, ...]
    """Of the published noise: mean |noise|."""
    seconds: float
    """Of one attack on one recording."""


SMOKE = Plan(cut=(1, 4), depths=(1, 2), scales=(0.05,), seconds=0.4)
STANDARD = Plan(cut=(2, 28), depths=(1, 2, 4), scales=(0.02, 0.05, 0.1), seconds=60.0)


def measure(subject: Subject, plan: Plan, names: Sequence[str]) -> dict[str, Result]:
    """Every attack on every recording."""
    found: dict[str, dict[str, AttackResult]] = {name: {} for name in names}
    for scale in (None, *plan.scales):
        case = _case(subject, plan.cut, scale)
        for name in names:
            found[name][_rule_text(scale)] = _attack(name, case, plan)
        if scale is None:
            noise = same_norm_noise(case)
            for name in names:
                found[name]["noise"] = _attack(name, noise, plan)
    for depth in plan.depths if DEEP in names else ():
        known = found[DEEP]["none"] if depth == plan.cut[0] else None
        if known is None:
            known = _attack(DEEP, _case(subject, (depth, plan.cut[1]), None), plan)
        found[DEEP][f"p={depth}"] = known
    return {name: result_of(name, results) for name, results in found.items()}


def result_of(name: str, results: Mapping[str, AttackResult]) -> Result:
    """The object of one attack; values are None where it could not run.

    Args:
        name: of the attack.
        results: by rule, `noise` for pure noise, `p=N` for other depths without noise.
    """
    clean, noise = results["none"], results["noise"]
    depths = {key: _value(one) for key, one in results.items() if key.startswith("p=")}
    at_depths = [value for value in depths.values() if value is not None]
    # A depth at which it could not run is no success: then there is no least.
    least = min(at_depths) if at_depths and len(at_depths) == len(depths) else None
    scales = {
        key.removeprefix("gaussian scale="): _value(one)
        for key, one in results.items()
        if key.startswith("gaussian")
    }
    share = clean.recovery
    return {
        # At every depth: the least counts.
        "recovery_clean": least if depths else _value(clean),
        "recovery_published_scales": scales,
        "recovery_pure_noise": _value(noise),
        "chance": clean.chance,
        "chance_error": clean.chance_error,
        "pure_noise_chance": noise.chance,
        "pure_noise_chance_error": noise.chance_error,
        "is_at_chance_on_pure_noise": _is_at_chance(noise),
        **({"recovery_clean_by_depth": depths} if depths else {}),
        "interval": None if share is None else [share.low, share.high],
        "tokens": None if share is None else share.num,
        "aim": str(clean.aim),
        "majority": clean.majority,
        "rouge_l": clean.rouge_l,
        "num_fallbacks": clean.num_fallbacks,
        "num_unfinished": clean.num_unfinished,
        "seconds": round(sum(one.seconds for one in results.values()), 2),
        **({} if clean.skipped is None else {"skipped": clean.skipped}),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    given = parse_arguments(__doc__ or "", arguments)
    plan = SMOKE if given.is_smoke else STANDARD
    with tempfile.TemporaryDirectory(prefix="cutlayer-attacks-") as folder:
        make = tiny_subject if given.is_smoke else real_subject
        result = measure(make(Path(folder), given.model), plan, attack_names([]))
    print_table("attacks", _COLUMNS, [_row(name, one) for name, one in result.items()])
    if given.as_json:
        print(json.dumps(result, allow_nan=False), flush=True)


_COLUMNS = ("attack", "clean", "published scales", "pure noise", "chance", "tokens", "seconds")


def _row(name: str, one: Result) -> list[str]:
    if "skipped" in one:
        return [name, f"not run: {one['skipped']}", "", "", "", "", ""]
    scales = one["recovery_published_scales"]
    assert isinstance(scales, dict)
    return [
        name,
        _shown(one["recovery_clean"]),
        ", ".join(f"{scale}: {_shown(value)}" for scale, value in scales.items()),
        _shown(one["recovery_pure_noise"]),
        _shown(one["chance"]),
        str(one["tokens"]),
        str(one["seconds"]),
    ]


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _case(subject: Subject, cut: tuple[int, int], scale: float | None) -> Case:
    spec = TrialSpec(
        lower=cut[0],
        upper=cut[1],
        rule=parse_rule(_rule_text(scale)),
        withhold="none",
        phase=Phase.BASE,
    )
    with tempfile.TemporaryDirectory(prefix="cutlayer-attacks-") as folder:
        seen = run_setting(spec, subject.bench.material, Path(folder))
    return case_of(spec, subject.bench, seen)


def _attack(name: str, case: Case, plan: Plan) -> AttackResult:
    return attack_evidence(name, case, plan.seconds, lambda what, share: None)


def _rule_text(scale: float | None) -> str:
    return "none" if scale is None else f"gaussian scale={scale:g}"


def _value(result: AttackResult) -> float | None:
    return None if result.recovery is None else result.recovery.value


def _is_at_chance(result: AttackResult) -> bool | None:
    value, chance, error = _value(result), result.chance, result.chance_error
    if value is None or chance is None or error is None:
        return None
    return abs(value - chance) <= 3 * error


if __name__ == "__main__":
    main()
