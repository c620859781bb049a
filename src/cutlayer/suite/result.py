"""What a run came to, as it is kept: numbers, never a text or a token. It measures nothing."""

from collections.abc import Sequence

import msgspec

from cutlayer.evaluation.published.question import Prediction
from cutlayer.suite.spec import RunSpec

__all__ = ["Figures", "Origin", "RunResult"]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a method gives back; `work` makes a result of it."""

    predictions: Sequence[Prediction]
    """One per test question, in order; empty for an audit."""
    losses: tuple[float, ...] = ()
    """Mean over the scored tokens of each step, all owners together."""
    train_seconds: float = 0.0
    score_seconds: float = 0.0
    num_train_tokens: int = 0
    bytes_up: int = 0
    """Of training, all owners together, as counted at the channel."""
    bytes_down: int = 0
    peak_client_bytes: int | None = None
    """Resident memory of the owner's process; None where it shares one with the server."""
    guarantee: str | None = None
    """What the noise promises; None where nothing leaves."""
    recovery: float | None = None
    """Share of tokens that the best attack recovered; audits alone."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a number comes from."""

    command: str
    """That makes it again."""
    commit: str
    """Of the sources; `-dirty` at its end where files differed; unknown outside a checkout."""
    versions: dict[str, str]
    """Of python, torch, transformers, peft, cutlayer."""
    machine: str
    """Processor cores, memory and threads; accelerator, if any."""
    began: str
    """UTC, ISO 8601."""


class RunResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run in the store."""

    spec: RunSpec
    origin: Origin
    error: str | None = None
    """Why it failed; the fields below are then empty."""
    seconds: float = 0.0
    """Whole, loading included."""
    metrics: dict[str, float] = {}
    """Official scores, 0 to 1."""
    items: dict[str, tuple[float, ...]] = {}
    """Per metric the value of each question, in order; the same questions for all methods."""
    chosen: tuple[int, ...] = ()
    """Place of the chosen answer of each question; empty for replies."""
    log_likelihoods: tuple[tuple[float, ...], ...] = ()
    """Of each choice of each question, in nats."""
    reply_digests: tuple[str, ...] = ()
    """SHA-256 of each reply; empty for choices."""
    questions_digest: str = ""
    """SHA-256 over keys of the test questions in order: results with another are not compared."""
    groups: tuple[int, ...] = ()
    """Number of each question's group, such as its story; empty where each is alone, and in results
    older than this field."""
    losses: tuple[float, ...] = ()
    train_seconds: float = 0.0
    score_seconds: float = 0.0
    num_train_tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    peak_client_bytes: int | None = None
    guarantee: str | None = None
    recovery: float | None = None
