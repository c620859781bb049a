"""What an audit says in plain words, and where `cutlayer train` finds it again.

A verdict holds numbers and words of ours, no private text. It does not attack.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from cutlayer.audit.attack import ATTACKS, Aim
from cutlayer.audit.results import PRIOR, Trial
from cutlayer.client.settings import ClientSettings
from cutlayer.data.assets import cache_folder
from cutlayer.data.telling import RULE
from cutlayer.model.agreement import hash_leaves
from cutlayer.settings import settings_digest
from cutlayer.storage.files import explain_os_errors, write_atomic

__all__ = [
    "NOT_AUDITED",
    "Grade",
    "Verdict",
    "find_verdict",
    "grade_of",
    "save_verdict",
    "sentence",
    "verdict_key",
    "verdict_line",
    "verdicts_folder",
]

NOT_AUDITED = "not audited: run cutlayer audit to see what an attacker recovers from this"
_OPEN, _LEAKS, _PARTLY = 0.9, 0.5, 0.1
_FEW_TOKENS = 300


class Grade(StrEnum):
    """How bad it is; every border is a share of private tokens."""

    OPEN = "open"
    """0.9 or more: as good as sending the text."""
    LEAKS = "leaks"
    """0.5 or more."""
    PARTLY = "leaks in part"
    """Above 0.1."""
    RESISTS = "resists these attacks"
    """0.1 or less."""
    UNKNOWN = "not tested"
    """No attack on tokens ran."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One audited setting."""

    key: str
    """`verdict_key`."""
    label: str
    """The setting in words."""
    phase: str
    grade: Grade
    recovery: float | None
    """Of the strongest attack; None where none ran."""
    attack: str | None
    threat: str
    num_tokens: int
    sentence: str


def verdict_key(settings: ClientSettings, leaves: Mapping[str, str]) -> str:
    """A name for what decides how much leaks: weights, cut, rules, withholding and what trains.

    Args:
        settings: of the client.
        leaves: hashes of the loaded tensors of head and tail.
    """
    privacy = settings.privacy
    facts: dict[str, object] = {
        "model": hash_leaves(leaves),
        "cut": [settings.model.lower, settings.model.upper],
        "dtype": settings.model.trunk_weights.told(settings.model.dtype),
        "rule": privacy.activation_rule().label,
        "gradient_rule": privacy.gradient_rule().label,
        "withhold": str(privacy.withhold),
        "adapter": settings_digest(settings.adapter),
    }
    # Only where they are used: verdicts from before them keep their names.
    others: dict[str, object] = {
        "keep_share": privacy.keep_share,
        "kept_by": RULE if privacy.keep_share else None,
        "denoiser": privacy.denoiser,
    }
    facts |= {name: value for name, value in others.items() if value}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def grade_of(recovery: float | None) -> Grade:
    """The grade of a share of tokens."""
    if recovery is None:
        return Grade.UNKNOWN
    steps = ((_OPEN, Grade.OPEN), (_LEAKS, Grade.LEAKS))
    for border, grade in steps:
        if recovery >= border:
            return grade
    return Grade.PARTLY if recovery > _PARTLY else Grade.RESISTS


def sentence(trial: Trial) -> str:
    """The verdict of one trial in one or two sentences for anybody."""
    worst = trial.worst
    if worst is None or worst.recovery is None:
        nothing = (
            "No attack on tokens ran on this setting, so nothing is known of what it protects."
        )
        return f"{nothing}{_about_labels(trial)}"
    share, sure = (
        worst.recovery,
        f"{_percent(worst.recovery.low)} to {_percent(worst.recovery.high)}",
    )
    text = (
        f"With this setting {_who(trial.threat)} recovers {_percent(share.value)} of your private "
        f"tokens ({worst.attack}; 95 % sure: {sure}; {share.num} tokens)"
    )
    if trial.prior is not None:
        text += f"; guessing by language alone, without seeing what left, {_percent(trial.prior)}"
    return f"{text}.{_about_labels(trial)}{_what_is_missing(trial)}"


def verdict_line(verdicts: list[Verdict]) -> str:
    """One line for `cutlayer train`: the worst of what is known of its setting."""
    if not verdicts:
        return NOT_AUDITED
    worst = max(verdicts, key=_badness)
    return f"audit: {worst.grade}: {worst.sentence}"


def verdicts_folder(chosen: Path | None) -> Path:
    """Where verdicts lie; None is the owner's cache."""
    return cache_folder() / "verdicts" if chosen is None else chosen


def save_verdict(trial: Trial, folder: Path) -> Verdict:
    """Keep the verdict of a trial; one of the same setting and phase that is milder is replaced.

    What was once recovered can be recovered: an audit with fewer attacks or less time takes no
    verdict back.
    """
    worst = trial.worst
    verdict = Verdict(
        key=trial.verdict_key,
        label=trial.label,
        phase=str(trial.spec.phase),
        grade=grade_of(trial.recovery),
        recovery=trial.recovery,
        attack=None if worst is None else worst.attack,
        threat=trial.threat,
        num_tokens=trial.num_tokens,
        sentence=sentence(trial),
    )
    with explain_os_errors(f"create {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    name = f"{verdict.key}-{verdict.phase}-{verdict.threat}.json"
    before = [one for one in find_verdict(verdict.key, folder) if _is_of(one, verdict)]
    if all(_badness(verdict) >= _badness(one) for one in before):
        write_atomic(folder / name, msgspec.json.encode(verdict))
    return verdict


def find_verdict(key: str, folder: Path) -> list[Verdict]:
    """Verdicts of a setting, none where it was not audited; a damaged file counts as none."""
    found = []
    for path in sorted(folder.glob(f"{key}-*.json")):
        try:
            verdict = msgspec.json.decode(path.read_bytes(), type=Verdict)
        except (OSError, msgspec.DecodeError):
            continue
        if verdict.key == key:
            found.append(verdict)
    return found


def _is_of(one: Verdict, other: Verdict) -> bool:
    return (one.phase, one.threat) == (other.phase, other.threat)


def _badness(one: Verdict) -> float:
    return -1.0 if one.recovery is None else one.recovery


def _what_is_missing(trial: Trial) -> str:
    """What could have recovered more: attacks that did not run or did not end, too few tokens."""
    ran = {one.attack for one in trial.attacks if one.recovery is not None}
    missing = sorted({*ATTACKS.names, *(one.attack for one in trial.attacks)} - ran - {PRIOR})
    unfinished = sorted({one.attack for one in trial.attacks if one.num_unfinished})
    text = f" Not run: {', '.join(missing)}." if missing else ""
    if unfinished:
        text += f" Out of time: {', '.join(unfinished)}; with more they may recover more."
    if trial.num_tokens < _FEW_TOKENS:
        text += f" {trial.num_tokens} tokens are too few to rely on."
    return text


def _who(threat: str) -> str:
    if threat == "T2":
        return "an attacker who knows the public weights and your trained adapters"
    return "an attacker who knows the public weights"


def _about_labels(trial: Trial) -> str:
    """What the strongest attack on labels says, where it beats the commonest answer."""
    ran = [(o, o.recovery) for o in trial.attacks if o.aim is Aim.LABELS and o.recovery is not None]
    if not ran:
        return ""
    worst, share = max(ran, key=lambda pair: pair[1].value)
    if share.value <= (worst.majority or 0.0):
        return ""
    majority = (
        "" if worst.majority is None else f" (the commonest alone: {_percent(worst.majority)})"
    )
    return f" From returned gradients it recovers {_percent(share.value)} of the answers{majority}."


def _percent(share: float) -> str:
    """Whole per cent, but never 0 or 100 where it is not exactly that."""
    if 0.0 < share < 0.01 or 0.99 < share < 1.0:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"
