"""What audits measured, read from the files that they leave; it knows four forms of them.

    trial-*.json, report.json   what `cutlayer audit` keeps in its folder
    {"trials": [...]}           what `cutlayer audit --json` prints
    {"settings": [...]}         what the benchmark of recovery against utility prints

It attacks nothing and chooses nothing (`leak`). The files do not name the model: whoever gives one
says that it is about this model.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.partition import Cut

__all__ = ["LeakRule", "Measured", "read_measured"]

_PRIOR = "language_prior"
"""The attack that looks at nothing that left: what it recovers was not lost to a cut."""
_TOKENS, _LABELS = "tokens", "labels"
_LABEL = re.compile(r"cut (?P<lower>\d+):(?P<upper>\d+), (?P<rest>.+)")
_MAX_BYTES = 256 * 2**20

Part = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(pattern=r"\A[\w.:+-]{1,64}\Z")]
"""Shown on the terminal of whoever plans with the file."""


@dataclass(frozen=True, kw_only=True)
class LeakRule:
    """What protects what leaves at the lower cut."""

    mechanism: str
    """Registered name."""
    scale: float | None = None
    """In the mechanism's own unit."""
    clip: float | None = None
    """Norm bound, in units of the activations."""
    withhold: str = "none"
    """privacy.withhold."""
    keep_share: float = 0.0
    """privacy.keep_share."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One audited setting."""

    cut: Cut
    rule: LeakRule
    recovery: float
    """Share of private tokens that the strongest attack recovered, 0 to 1."""
    attack: str
    """Its name."""
    num_rows: int | None
    """Rows that were attacked; None where the file does not say."""
    num_tokens: int | None
    """Private tokens of them; None where the file does not say."""
    labels: float | None
    """Share of answers that the strongest attack on labels recovered; None where none ran."""
    threat: str
    """Who attacked: T1, T2, or empty."""
    phase: str
    """base or trained: the weights that were attacked."""
    source: str
    """File that says so."""


class _Share(msgspec.Struct, frozen=True):
    value: Part


class _Result(msgspec.Struct, frozen=True):
    attack: Name
    aim: str
    recovery: _Share | None = None


class _Rule(msgspec.Struct, frozen=True):
    mechanism: str
    scale: float | None = None
    clip: float | None = None


class _Spec(msgspec.Struct, frozen=True):
    lower: Count
    upper: Count
    rule: _Rule
    withhold: str
    phase: str


class _Trial(msgspec.Struct, frozen=True):
    spec: _Spec
    num_rows: Count
    num_tokens: Count
    threat: str
    attacks: list[_Result]


class _Setting(msgspec.Struct, frozen=True):
    label: str
    by_attack: dict[Name, Part]


def read_measured(paths: Sequence[Path]) -> list[Measured]:
    """Every setting of these files on which an attack on tokens ran.

    Args:
        paths: files of the forms above, or folders of audits.

    Raises:
        StorageError: a path is missing or cannot be read, a file is damaged or holds no audit, or
            no file holds an audited setting.
    """
    found = [one for path in paths for file in _files(path) for one in _measured_of(file)]
    if paths and not found:
        names = ", ".join(str(path) for path in paths)
        raise StorageError(
            f"{names}: no setting there on which an attack on tokens ran; run cutlayer audit first"
        )
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # The report holds the grid of the last start alone, the trials all that were ever done.
    files = sorted(path.glob("trial-*.json")) or sorted(path.glob("report.json"))
    if not files:
        raise StorageError(
            f"{path} holds no audit: neither trial-*.json nor report.json; give the audit.folder"
        )
    return files


def _measured_of(path: Path) -> Iterator[Measured]:
    trials, settings = _items(_content(path), path)
    try:
        for trial in msgspec.convert(trials, list[_Trial]):
            yield from _of_trial(trial, path)
        for setting in msgspec.convert(settings, list[_Setting]):
            yield from _of_setting(setting, path)
    except (msgspec.ValidationError, ConfigError) as error:
        raise StorageError(f"{path} is no result of an audit, or damaged: {error}") from error


def _content(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(f"cannot read audit results {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise StorageError(f"{path} is larger than {_MAX_BYTES} bytes: no audit's results")
    # What `--json` printed is the last line of a kept standard output.
    lines = data.strip().splitlines() or [b""]
    for text in (data, lines[-1]):
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    raise StorageError(
        f"{path} is not JSON; give what cutlayer audit --json printed, or its folder"
    )


def _items(content: object, path: Path) -> tuple[list[object], list[object]]:
    """Trials, and settings in words."""
    if isinstance(content, list):
        return content, []
    if isinstance(content, dict):
        trials, settings = content.get("trials"), content.get("settings")
        if isinstance(trials, list):
            return trials, []
        if isinstance(settings, list):
            return [], settings
        if "spec" in content:
            return [content], []
    raise StorageError(
        f"{path} holds no audit's results: expected trials of cutlayer audit, as report.json has"
    )


def _of_trial(trial: _Trial, path: Path) -> Iterator[Measured]:
    worst = _worst(trial.attacks, _TOKENS)
    if worst is None:
        return
    spec, labels = trial.spec, _worst(trial.attacks, _LABELS)
    withhold, keep_share = _withheld(spec.withhold, path)
    rule = spec.rule
    yield Measured(
        cut=Cut(spec.lower, spec.upper),
        rule=LeakRule(
            mechanism=rule.mechanism,
            scale=rule.scale,
            clip=rule.clip,
            withhold=withhold,
            keep_share=keep_share,
        ),
        recovery=worst[0],
        attack=worst[1],
        num_rows=trial.num_rows,
        num_tokens=trial.num_tokens,
        labels=None if labels is None else labels[0],
        threat=trial.threat,
        phase=spec.phase,
        source=str(path),
    )


def _worst(results: Sequence[_Result], aim: str) -> tuple[float, str] | None:
    ran = [
        (one.recovery.value, one.attack)
        for one in results
        if one.recovery is not None and one.aim == aim and one.attack != _PRIOR
    ]
    return max(ran, default=None)


def _of_setting(setting: _Setting, path: Path) -> Iterator[Measured]:
    """A setting in words, as `TrialSpec.label` writes it."""
    by_attack = {name: share for name, share in setting.by_attack.items() if name != _PRIOR}
    if not by_attack:
        return
    attack = max(by_attack, key=lambda name: by_attack[name])
    cut, rule, phase = _of_label(setting.label, path)
    yield Measured(
        cut=cut,
        rule=rule,
        recovery=by_attack[attack],
        attack=attack,
        num_rows=None,
        num_tokens=None,
        labels=None,
        threat="",
        phase=phase,
        source=str(path),
    )


def _of_label(label: str, path: Path) -> tuple[Cut, LeakRule, str]:
    found = _LABEL.fullmatch(label)
    if found is None:
        raise StorageError(f"{path} is damaged: {label!r} names no audited setting")
    rule_text, *withheld, phase = found["rest"].split(", ")
    mechanism, *pairs = rule_text.split()
    numbers = {key: _number(value, path) for key, _, value in (p.partition("=") for p in pairs)}
    text = withheld[0].removeprefix("withhold=") if withheld else "none"
    withhold, keep_share = _withheld(text, path)
    rule = LeakRule(
        mechanism=mechanism,
        scale=numbers.get("scale"),
        clip=numbers.get("clip"),
        withhold=withhold,
        keep_share=keep_share,
    )
    return Cut(int(found["lower"]), int(found["upper"])), rule, phase


def _withheld(text: str, path: Path) -> tuple[str, float]:
    """Of `private keep_share=0.05`: what is withheld, and the share that leaves all the same."""
    withhold, _, share = text.partition(" keep_share=")
    return withhold, _number(share, path) if share else 0.0


def _number(text: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise StorageError(f"{path} is damaged: {text!r} is no number") from error
