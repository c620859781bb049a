"""The report of an audit: one HTML page that needs nothing else, JSON, and pictures.

It shows what the trials hold and computes no score. Private text is in it only where the trials
have examples, which the owner has to ask for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import jinja2
import msgspec

from cutlayer.audit.attack import Aim
from cutlayer.audit.plots import pictures, write_png
from cutlayer.audit.results import PRIOR, AttackResult, Example, Trial
from cutlayer.audit.shares import Share
from cutlayer.audit.verdict import Grade, grade_of, sentence
from cutlayer.storage.files import write_atomic

__all__ = ["About", "report_html", "write_report"]

_CSS = {
    Grade.OPEN: "open",
    Grade.LEAKS: "leaks",
    Grade.PARTLY: "part",
    Grade.RESISTS: "resists",
    Grade.UNKNOWN: "unknown",
}
_DASH = "\N{EN DASH}"
_MAX_VERDICTS = 3
_ATTACKERS = {
    "T1": (
        "The server itself: it follows the protocol, keeps all it sees, and knows the public "
        "weights."
    ),
    "T2": (
        "The server with the help of another client: it keeps all it sees, and knows the public "
        "weights and the trained adapters of head and tail."
    ),
}
_NO_TEXT = "This report holds no private text: numbers alone."
_HAS_TEXT = "This report holds private text, as audit.show_examples asked: guard it like the data."


@dataclass(frozen=True, kw_only=True)
class About:
    """What the trials of a report have in common."""

    title: str
    """Model and data in few words; nothing private."""
    made: str
    """When and by what."""
    min_tokens: int
    """Fewer private tokens make the report warn."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    text: str
    share: float | None
    title: str


@dataclass(frozen=True, kw_only=True)
class _Row:
    attack: str
    about: str
    is_prior: bool
    skipped: str | None
    cells: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Block:
    number: int
    label: str
    cells: list[_Cell]
    accuracy: str
    perplexity: str
    epsilon: str
    facts: list[tuple[str, str]]
    rows: list[_Row]


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    css: str
    grade: str
    sentence: str
    label: str
    utility: str


@dataclass(frozen=True, kw_only=True)
class _Page:
    title: str
    made: str
    verdicts: list[_Verdict]
    warnings: list[str]
    attacks: list[str]
    trials: list[_Block]
    attacker: str
    private_note: str = field(repr=False)


def write_report(trials: Sequence[Trial], about: About, folder: Path) -> list[Path]:
    """Write report.html, report.json and the pictures; their paths.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    page, values = folder / "report.html", folder / "report.json"
    write_atomic(page, report_html(trials, about).encode())
    write_atomic(values, msgspec.json.format(msgspec.json.encode(list(trials)), indent=1))
    return [page, values, *write_png(trials, folder)]


def report_html(trials: Sequence[Trial], about: About) -> str:
    """The page."""
    room = files("cutlayer.audit") / "static"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((room / "report.html").read_text(encoding="utf-8"))
    css = (room / "report.css").read_text(encoding="utf-8")
    return template.render(
        page=_page(trials, about),
        css=css,
        pictures={"recovery": "", "front": ""} | pictures(trials),
    )


def _page(trials: Sequence[Trial], about: About) -> _Page:
    names = list(dict.fromkeys(one.attack for trial in trials for one in trial.attacks))
    threats = dict.fromkeys(trial.threat for trial in trials)
    has_text = any(one.examples for trial in trials for one in trial.attacks)
    return _Page(
        title=about.title,
        made=about.made,
        verdicts=_verdicts(trials),
        warnings=_warnings(trials, about.min_tokens),
        attacks=names,
        trials=[_block(number, trial, names) for number, trial in enumerate(trials, 1)],
        attacker=" ".join(_ATTACKERS.get(threat, threat) for threat in threats),
        private_note=_HAS_TEXT if has_text else _NO_TEXT,
    )


def _verdicts(trials: Sequence[Trial]) -> list[_Verdict]:
    """All of a few settings; of many the first, the worst and the safest."""
    chosen = list(trials)
    if len(chosen) > _MAX_VERDICTS:
        # What was not attacked is not the safest.
        known = [trial for trial in chosen if trial.recovery is not None] or chosen
        ranked = sorted(known, key=lambda trial: trial.recovery or 0.0)
        unique = {trial.label: trial for trial in (chosen[0], ranked[-1], ranked[0])}
        chosen = list(unique.values())
    return [
        _Verdict(
            css=_CSS[grade_of(trial.recovery)],
            grade=str(grade_of(trial.recovery)),
            sentence=sentence(trial),
            label=trial.label,
            utility=_utility_text(trial),
        )
        for trial in chosen
    ]


def _warnings(trials: Sequence[Trial], min_tokens: int) -> list[str]:
    found = []
    few = min((trial.num_tokens for trial in trials), default=0)
    if few < min_tokens:
        found.append(
            f"Only {few} private tokens were there to attack; {min_tokens} or more make the "
            "numbers trustworthy. Give the audit more rows."
        )
    unfinished = [o for trial in trials for o in trial.attacks if o.num_unfinished]
    if unfinished:
        names = ", ".join(sorted({one.attack for one in unfinished}))
        found.append(
            f"Time ran out for {names} at some positions; with more (audit.seconds_per_setting) "
            "they may recover more."
        )
    return found


def _block(number: int, trial: Trial, names: Sequence[str]) -> _Block:
    by_name = {one.attack: one for one in trial.attacks}
    utility = trial.utility
    accuracy = None if utility is None else utility.accuracy
    perplexity = None if utility is None else utility.perplexity
    return _Block(
        number=number,
        label=trial.label,
        cells=[_cell(by_name.get(name)) for name in names],
        accuracy=_DASH if accuracy is None else f"{accuracy:.3f}",
        perplexity=_DASH if perplexity is None else f"{perplexity:.3g}",
        epsilon=trial.epsilon,
        facts=_facts(trial),
        rows=[_row(one) for one in trial.attacks],
    )


def _cell(result: AttackResult | None) -> _Cell:
    if result is None or result.recovery is None:
        reason = "" if result is None else result.skipped or ""
        return _Cell(text=_DASH, share=None, title=reason)
    share = result.recovery
    title = f"{_percent(share.low)} to {_percent(share.high)} of {share.num}"
    return _Cell(text=_percent(share.value), share=round(share.value, 3), title=title)


def _facts(trial: Trial) -> list[tuple[str, str]]:
    facts = [
        ("noise rule", f"{trial.mechanism_label}: {trial.guarantee}"),
        ("epsilon", trial.epsilon),
        ("attacked", f"{trial.num_tokens} private tokens of {trial.num_rows} rows"),
        ("each row left", "once" if trial.passes == 1 else f"{trial.passes} times"),
        ("attacker", trial.threat),
        ("utility", _utility_text(trial) or "not measured"),
        (
            "time",
            f"{trial.seconds:.0f} s, {trial.attack_seconds:.0f} s of it attacks, and "
            f"{trial.tune_seconds:.0f} s of fine-tuning",
        ),
    ]
    return facts


_OF = {
    Aim.LABELS: " of answers",
    Aim.BAG: " of token kinds",
    Aim.CANARIES: " of planted secrets",
}


def _row(result: AttackResult) -> _Row:
    if result.recovery is None:
        return _Row(
            attack=result.attack,
            about=result.about,
            is_prior=result.attack == PRIOR,
            skipped=result.skipped or "nothing to say about this recording",
        )
    share = result.recovery
    what = _OF.get(result.aim, "")
    cells = (
        _percent(share.value) + what,
        f"{_percent(share.low)} to {_percent(share.high)} (n = {share.num})",
        _chance(result),
        _DASH if result.rouge_l is None else f"{result.rouge_l:.2f}",
        _share(result.rare),
        _DASH
        if result.canaries is None
        else f"{result.canaries.value:.0%} of {result.canaries.num}",
        str(result.num_fallbacks),
        str(result.num_unfinished),
        f"{result.seconds:.1f}",
    )
    return _Row(
        attack=result.attack,
        about=result.about,
        is_prior=result.attack == PRIOR,
        skipped=None,
        cells=cells,
        examples=result.examples,
    )


def _chance(result: AttackResult) -> str:
    """The right answer by luck; for labels also what the commonest alone gets."""
    parts = []
    if result.chance is not None:
        error = "" if result.chance_error is None else f" ± {100 * result.chance_error:.1f}"
        parts.append(f"{100 * result.chance:.1f}{error} %")
    if result.majority is not None:
        parts.append(f"commonest {_percent(result.majority)}")
    return ", ".join(parts) or _DASH


def _utility_text(trial: Trial) -> str:
    utility = trial.utility
    if utility is None:
        return ""
    parts = []
    if utility.accuracy is not None:
        parts.append(f"task score {utility.accuracy:.3f}")
    if utility.perplexity is not None:
        parts.append(f"perplexity {utility.perplexity:.3g}")
    return f"{', '.join(parts)} on {utility.num_rows} held-out rows" if parts else ""


def _share(share: Share | None) -> str:
    return _DASH if share is None or share.num == 0 else f"{_percent(share.value)} of {share.num}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
