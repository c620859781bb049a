"""Markdown tables of results. They judge nothing and draw nothing."""

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from cutlayer.suite.arms import Arm, Sheet
from cutlayer.suite.compare import common_seeds, difference, score
from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import Method
from cutlayer.suite.targets import Target, Verdict, agreements, signed, with_interval

__all__ = [
    "agreement_table",
    "cut_arms",
    "cut_table",
    "failures_table",
    "markdown_table",
    "origin_table",
    "recoveries",
    "scores_table",
    "targets_table",
    "without_paths",
]

_NOTHING = "-"
_MACHINE_PATH = re.compile(r"(?<![\w.:/])(?:[A-Za-z]:)?/(?:[\w.+@-]+/)+([\w.+@-]+)")
_MAX_ERROR_CHARS = 240


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Header, rule and rows; a cell's line ends and bars do no harm."""
    lines = [_line(header), "|" + "---|" * len(header)]
    return "\n".join([*lines, *(_line(row) for row in rows)]) + "\n"


def scores_table(sheet: Sheet, metric: str) -> str:
    """All methods of a task: scores with intervals, distance to centralised, cost.

    Args:
        metric: key of `RunResult.items` by which runs are compared.

    Raises:
        DataError: runs that must be compared answered different questions.
    """
    others = _other_metrics(sheet, metric)
    header = ["method", metric, *others, "seeds", "against centralised", "by seed"]
    header += ["training, s", "scoring, s", "MB up", "MB down", "tokens"]
    return markdown_table(header, (_scores_row(sheet, arm, metric, others) for arm in sheet.scored))


def agreement_table(all_sheets: Iterable[Sheet]) -> str:
    """Split against centralised, run by run; empty where no seed has both."""
    header = ["task", "seed", "steps", "largest relative difference of losses", "other answers"]
    header += ["of these near ties", "largest difference of log-likelihoods"]
    rows = [
        [
            sheet.task,
            str(one.seed),
            str(one.num_steps),
            f"{one.loss_difference:.1e}",
            f"{one.num_changed} of {one.num_questions}",
            str(one.num_near_ties),
            _optional(one.log_likelihood_difference, "{:.1e}".format),
        ]
        for sheet in all_sheets
        for one in agreements(sheet)
    ]
    return markdown_table(header, rows) if rows else ""


def targets_table(found: Iterable[Target]) -> str:
    """Verdicts with the numbers that they rest on."""
    rows = [
        [target.what, target.task, _verdict(target.verdict), target.numbers or _NOTHING]
        for target in found
    ]
    return markdown_table(["target", "task", "verdict", "numbers"], rows)


def cut_arms(sheet: Sheet) -> list[Arm]:
    """One plain split arm for each p and q, in their order; one with its own process if there is.

    Empty where fewer than two cuts were run: nothing is compared then.
    """
    by_cut: dict[tuple[int, int], Arm] = {}
    for arm in sorted(sheet.plain_splits, key=lambda arm: arm.spec.in_processes):
        by_cut[arm.spec.head_blocks, arm.spec.tail_blocks] = arm
    return [by_cut[cut] for cut in sorted(by_cut)] if len(by_cut) > 1 else []


def cut_table(sheet: Sheet, all_sheets: Iterable[Sheet], metric: str) -> str:
    """Score, cost and leakage by the number of blocks at the client; empty without two cuts.

    Args:
        all_sheets: where audits of the same task and model are looked for.

    Raises:
        DataError: runs that must be compared answered different questions.
    """
    audits = recoveries(sheet, all_sheets)
    header = ["p", "q", metric, "against centralised", "training, s", "scoring, s"]
    header += ["client memory, MB", "MB up", "MB down", "tokens recovered"]
    rows = [
        [
            str(arm.spec.head_blocks),
            str(arm.spec.tail_blocks),
            _score(arm, metric),
            _against_centralised(sheet, arm, metric)[0],
            *_seconds(arm),
            _optional(_mean_of(arm, lambda run: run.peak_client_bytes), _megabytes),
            *_traffic(arm),
            _optional(audits.get((arm.spec.head_blocks, arm.spec.tail_blocks)), _percent),
        ]
        for arm in cut_arms(sheet)
    ]
    return markdown_table(header, rows) if rows else ""


def recoveries(sheet: Sheet, all_sheets: Iterable[Sheet]) -> dict[tuple[int, int], float]:
    """Share of tokens that audits of the plain split recovered, by p and q.

    Args:
        sheet: the task and model asked for.
        all_sheets: where audits are looked for: their sizes may be others.
    """
    found = {}
    for other in all_sheets:
        if (other.task, other.model, other.source) != (sheet.task, sheet.model, sheet.source):
            continue
        for arm in other.arms:
            recovery = _mean_of(arm, lambda run: run.recovery)
            is_plain = (arm.spec.codec, arm.spec.mechanism) == ("raw", "none")
            if arm.spec.method is Method.AUDIT and is_plain and recovery is not None:
                found[arm.spec.head_blocks, arm.spec.tail_blocks] = recovery
    return found


def failures_table(results: Iterable[RunResult]) -> str:
    """Runs that ended in an error; empty where none did."""
    failed = [run for run in results if run.error is not None]
    rows = [[f"`{run.spec.run_id}`", _harmless(run.error or "")] for run in _by_id(failed)]
    return markdown_table(["run", "error"], rows) if rows else ""


def origin_table(results: Iterable[RunResult]) -> str:
    """Command, commit, time and machine of every run, then machines and versions by number."""
    runs = _by_id(results)
    machines = list(dict.fromkeys(run.origin.machine for run in runs))
    versions = list(dict.fromkeys(_versions(run) for run in runs))
    header = ["run", "command", "commit", "began (UTC)", "seconds", "machine", "versions"]
    rows = [
        [
            f"`{run.spec.run_id}`",
            f"`{without_paths(run.origin.command)}`",
            run.origin.commit,
            run.origin.began,
            f"{run.seconds:.0f}",
            str(machines.index(run.origin.machine) + 1),
            str(versions.index(_versions(run)) + 1),
        ]
        for run in runs
    ]
    legend = [_numbered("Machine", machines), _numbered("Versions", versions)]
    return "\n".join([*legend, "", markdown_table(header, rows)])


def without_paths(text: str) -> str:
    """The text with the folders of one machine left out; names of files stay."""
    return _MACHINE_PATH.sub(r".../\1", text)


def _scores_row(sheet: Sheet, arm: Arm, metric: str, others: Sequence[str]) -> list[str]:
    return [
        arm.name,
        _score(arm, metric),
        *(_optional(_mean_metric(arm, other), _hundredths) for other in others),
        str(len(arm.results)),
        *_against_centralised(sheet, arm, metric),
        *_seconds(arm),
        *_traffic(arm),
        _optional(_mean_of(arm, lambda run: run.num_train_tokens or None), "{:,.0f}".format),
    ]


def _score(arm: Arm, metric: str) -> str:
    summary = score(arm, metric)
    low, high = _hundredths(summary.low), _hundredths(summary.high)
    return f"{_hundredths(summary.mean)} [{low}, {high}]"


def _against_centralised(sheet: Sheet, arm: Arm, metric: str) -> tuple[str, str]:
    """Difference with its interval, and by seed."""
    reference = sheet.partner(arm)
    if reference is None or arm is reference or not common_seeds(arm, reference):
        return _NOTHING, _NOTHING
    gap = difference(arm, reference, metric)
    other = "" if reference.spec.adapter == arm.spec.adapter else f" (to {reference.spec.adapter})"
    if reference.spec.owners > 1:
        other += " (same rows in every step)"
    return with_interval(gap) + other, ", ".join(signed(points) for points in gap.by_seed_points)


def _seconds(arm: Arm) -> tuple[str, str]:
    training = _mean_of(arm, lambda run: run.train_seconds or None)
    return (
        _optional(training, "{:.0f}".format),
        _optional(_mean_of(arm, lambda run: run.score_seconds or None), "{:.0f}".format),
    )


def _traffic(arm: Arm) -> tuple[str, str]:
    return (
        _optional(_mean_of(arm, lambda run: run.bytes_up or None), _megabytes),
        _optional(_mean_of(arm, lambda run: run.bytes_down or None), _megabytes),
    )


def _other_metrics(sheet: Sheet, metric: str) -> list[str]:
    names = {name for arm in sheet.scored for run in arm.results for name in run.metrics}
    return sorted(names - {metric})


def _mean_metric(arm: Arm, metric: str) -> float | None:
    return _mean_of(arm, lambda run: run.metrics.get(metric))


def _mean_of(arm: Arm, value_of: Callable[[RunResult], float | None]) -> float | None:
    """Over the seeds that have it."""
    values = [value for value in map(value_of, arm.results) if value is not None]
    return fmean(values) if values else None


def _optional(value: float | None, text_of: Callable[[float], str]) -> str:
    return _NOTHING if value is None else text_of(value)


def _hundredths(value: float) -> str:
    return f"{100.0 * value:.1f}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


def _megabytes(num_bytes: float) -> str:
    megabytes = num_bytes / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 10 else f"{megabytes:.2g}"


def _verdict(verdict: Verdict) -> str:
    return f"**{verdict.value}**" if verdict is Verdict.MISSED else verdict.value


def _by_id(results: Iterable[RunResult]) -> list[RunResult]:
    return sorted(results, key=lambda run: run.spec.run_id)


def _versions(run: RunResult) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(run.origin.versions.items()))


def _numbered(title: str, texts: Sequence[str]) -> str:
    lines = [f"* {title} {number}: {text}" for number, text in enumerate(texts, 1)]
    return "\n".join(lines)


def _harmless(error: str) -> str:
    """First line of an error, short and without a path of one machine."""
    first = without_paths(error.strip().splitlines()[0] if error.strip() else "no message")
    return first if len(first) <= _MAX_ERROR_CHARS else f"{first[:_MAX_ERROR_CHARS]}..."


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"
