"""Settings of an audit: what is attacked, with what, for how long. It does nothing."""

from enum import StrEnum
from pathlib import Path

from pydantic import Field, field_validator

from cutlayer.audit.knowledge import Threat
from cutlayer.settings import Settings

__all__ = ["AuditPlan", "AuditSettings", "Phase", "SearchPlan"]


class Phase(StrEnum):
    """Which weights head and tail have while rows leave."""

    BASE = "base"
    """The public ones: the first step of a run, and an evaluation of the base model."""
    TRAINED = "trained"
    """After a fine-tune as the client's settings say, noise included."""


class SearchPlan(Settings):
    """How `--search` looks for a setting."""

    max_trials: int = Field(default=40, ge=1)
    """Settings tried at most."""
    halvings: int = Field(default=3, ge=0)
    """Times that the gap between a scale that leaks and one that does not is halved."""
    max_scale_factor: float = Field(default=64.0, ge=1)
    """How far beyond the largest scale of a mechanism the search may go."""


class AuditPlan(Settings):
    """One audit: a grid of settings, each attacked on the owner's own rows."""

    client: Path
    """The client's settings file: model, cut, privacy, adapter, data, and how it trains."""
    folder: Path = Path("audit")
    """Results and report; a private folder. Started again, the audit goes on from what is there."""
    verdicts: Path | None = None
    """Folder of verdicts; None is the owner's cache, where `cutlayer train` looks."""
    cuts: list[tuple[int, int]] = Field(default=[])
    """Cuts to try, as [lower, upper]; empty takes the client's own."""
    rules: list[str] = Field(default=[])
    """Noise rules to try, as NAME or NAME scale=X clip=Y; empty takes the client's own."""
    withhold: list[str] = Field(default=[])
    """Values of privacy.withhold to try; empty takes the client's own."""
    phases: list[Phase] = Field(default=[Phase.BASE], min_length=1)
    """base: with the public weights; trained: after a fine-tune."""
    attacks: list[str] = Field(default=[])
    """Attacks to run; empty runs all that there are."""
    threat: Threat = Threat.T1
    """T1: the server knows the public weights; T2: also the trained adapters of head and tail."""
    rows: int = Field(default=24, ge=1)
    """Private rows to attack, from the beginning of data.train."""
    min_tokens: int = Field(default=300, ge=1)
    """Private tokens below which the report says that it is too small; rows are added up to it."""
    passes: int = Field(default=1, ge=1)
    """Times that each row leaves, as in so many epochs; repeats help attacks that average."""
    train_steps: int | None = Field(default=None, ge=1)
    """Steps of the fine-tune before phase trained; None takes the client's own."""
    canaries: int = Field(default=4, ge=0)
    """Secrets of random digits that are put among the rows, to see whether they come back whole."""
    seconds_per_setting: float = Field(default=1080.0, gt=0)
    """Time of all attacks on one setting; each gets an equal share of what is left. What is
    unfinished then takes the best so far."""
    public: str | None = "asset:bbcnews"
    """Public text for attacks that learn: text or data file, folder, or asset:NAME; none skips
    them."""
    public_rows: int = Field(default=400, ge=1)
    """Rows of public text at most."""
    utility_rows: int = Field(default=200, ge=0)
    """Held-out rows for the score beside the attacks; 0 takes none."""
    show_examples: bool = False
    """Show guessed and true text side by side: the report then holds private text."""
    seed: int = Field(default=0, ge=0)
    """Of what attacks draw at random."""
    search: SearchPlan = SearchPlan()
    """For `--search`."""

    @field_validator("cuts")
    @classmethod
    def _are_ordered(cls, cuts: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for lower, upper in cuts:
            if not 0 <= lower <= upper:
                raise ValueError(f"cut [{lower}, {upper}] needs 0 <= lower <= upper")
        return cuts


class AuditSettings(Settings):
    """The file of `cutlayer audit`."""

    audit: AuditPlan
    """The audit."""
