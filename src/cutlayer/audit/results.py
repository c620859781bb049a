"""What came out of an audit, as plain values and one JSON file a trial. It judges nothing.

A trial is written when it is done, whole or not at all, and never repeated: an audit that is
started again reads it instead.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from cutlayer.audit.attack import Aim
from cutlayer.audit.grid import TrialSpec
from cutlayer.audit.shares import Share
from cutlayer.errors import StorageError
from cutlayer.storage.files import private_folder, write_atomic

__all__ = [
    "PRIOR",
    "AttackResult",
    "Example",
    "Store",
    "Trial",
    "Utility",
    "without_examples",
]

_IDENTITY = "audit.json"
PRIOR = "language_prior"
"""The attack that looks at nothing that left."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One guess beside the truth; only where the owner asked for private text."""

    truth: str
    guess: str


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """One attack on one trial."""

    attack: str
    """Registered name."""
    aim: Aim
    about: str
    """One line with its source."""
    skipped: str | None = None
    """Why it could not run, or had no time to; the scores are then absent."""
    recovery: Share | None = None
    """Exact tokens in their place, of private ones; of labels under Aim.LABELS, and of the row's
    different tokens under Aim.BAG."""
    chance: float | None = None
    """The same guesses against shuffled targets."""
    chance_error: float | None = None
    """Its standard error."""
    rouge_l: float | None = None
    """F1 on text."""
    rare: Share | None = None
    """Rare tokens recovered."""
    canaries: Share | None = None
    """Planted texts recovered whole."""
    majority: float | None = None
    """Aim.LABELS: the share that always guessing the commonest label gets."""
    num_fallbacks: int = 0
    """Positions with the slow exact search."""
    num_unfinished: int = 0
    """Positions that ran out of time."""
    seconds: float = 0.0
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Utility:
    """What the model is still good for under the setting, over the split path with its noise."""

    accuracy: float | None = None
    """Choice accuracy on held-out rows; None where the rows are no multiple choice."""
    perplexity: float | None = None
    """exp of the mean loss of the scored tokens of held-out rows."""
    num_rows: int = 0
    """Held-out rows."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting, attacked."""

    spec: TrialSpec
    label: str
    """The setting in words."""
    mechanism_label: str
    """The rule exactly, as `Mechanism.label` has it."""
    guarantee: str
    """What the rule promises."""
    epsilon: str
    """The accountant's text for what left in this trial, units included."""
    threat: str
    """T1 or T2."""
    verdict_key: str
    """`verdict.verdict_key` of the setting."""
    num_rows: int
    num_tokens: int
    """Private tokens."""
    passes: int
    """Times that each row left."""
    attacks: tuple[AttackResult, ...]
    utility: Utility | None = None
    seconds: float = 0.0
    """Recording, score and attacks, without the fine-tune."""
    tune_seconds: float = 0.0
    """The fine-tune."""

    @property
    def attack_seconds(self) -> float:
        """Of all attacks together."""
        return sum(one.seconds for one in self.attacks)

    @property
    def token_attacks(self) -> list[AttackResult]:
        """Attacks on tokens that ran and that look at what left, the strongest first."""
        ran = [
            one
            for one in self.attacks
            if one.recovery is not None and one.aim is Aim.TOKENS and one.attack != PRIOR
        ]
        return sorted(ran, key=lambda one: -_value(one))

    @property
    def worst(self) -> AttackResult | None:
        """The attack that recovers most tokens; None where none ran."""
        return next(iter(self.token_attacks), None)

    @property
    def recovery(self) -> float | None:
        """Of the worst attack."""
        return None if self.worst is None else _value(self.worst)

    @property
    def prior(self) -> float | None:
        """What guessing by language alone recovers, where that was run."""
        found = [one for one in self.attacks if one.attack == PRIOR and one.recovery is not None]
        return _value(found[0]) if found else None


class Store:
    """The folder of one audit."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Open it, or make it.

        Args:
            folder: made private where it is not there.
            identity: hash of what the audit's trials have in common.

        Raises:
            StorageError: it holds another audit, or no audit at all.
        """
        self.folder = private_folder(folder)
        path = folder / _IDENTITY
        if not path.exists():
            if any(folder.iterdir()):
                raise StorageError(f"{folder} holds no audit, but other files; choose a new folder")
            write_atomic(path, msgspec.json.encode({"identity": identity}))
        elif _read(path, dict[str, str]).get("identity") != identity:
            raise StorageError(
                f"{folder} holds the audit of another model, data set or attacker; choose another "
                "audit.folder, or go on with the settings that made it"
            )

    def load(self, spec: TrialSpec) -> Trial | None:
        """A trial that is done; None where it is not.

        Raises:
            StorageError: the file is damaged.
        """
        path = self._path(spec)
        if not path.exists():
            return None
        trial = _read(path, Trial)
        if trial.spec != spec:
            raise StorageError(f"{path} holds the trial of another setting; remove it")
        return trial

    def save(self, trial: Trial) -> None:
        """Write one trial, whole or not at all."""
        data = msgspec.json.format(msgspec.json.encode(trial), indent=1)
        write_atomic(self._path(trial.spec), data)

    def _path(self, spec: TrialSpec) -> Path:
        return self.folder / f"trial-{spec.key}.json"


def without_examples(trial: Trial) -> Trial:
    """The same without private text."""
    attacks = tuple(replace(one, examples=()) for one in trial.attacks)
    return replace(trial, attacks=attacks)


def _value(result: AttackResult) -> float:
    assert result.recovery is not None
    return result.recovery.value


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise StorageError(f"{path} is damaged ({error}); remove it to repeat its trial") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
