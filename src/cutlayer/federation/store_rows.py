"""Rows of the federation's store as pages and commands want them, and its tables. It reads nothing.

Times are ISO texts in UTC; `seconds` are of the coordinator's clock.
"""

from dataclasses import dataclass

__all__ = ["ADDED", "SCHEMA", "AttemptRow", "MemberRow", "MetricRow", "Pinned", "RoundRow"]

SCHEMA = """
CREATE TABLE federation (
    name TEXT PRIMARY KEY, created_at TEXT NOT NULL,
    policy TEXT, fingerprint TEXT, layout TEXT, pinned_by TEXT
);
CREATE TABLE members (
    name TEXT PRIMARY KEY, joined_at TEXT NOT NULL, left_at TEXT, last_seen TEXT NOT NULL,
    num_rounds INTEGER NOT NULL DEFAULT 0, num_straggled INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE rounds (
    number INTEGER PRIMARY KEY, attempts INTEGER NOT NULL, began_at TEXT NOT NULL,
    ended_at TEXT NOT NULL, seconds REAL NOT NULL, cohort TEXT NOT NULL, survivors TEXT NOT NULL,
    stragglers TEXT NOT NULL, total_weight INTEGER NOT NULL, bytes_up INTEGER NOT NULL,
    bytes_down INTEGER NOT NULL, digest TEXT NOT NULL, payload_digest TEXT NOT NULL
);
CREATE TABLE attempts (
    round INTEGER NOT NULL, number INTEGER NOT NULL, began_at TEXT NOT NULL, ended_at TEXT,
    cohort TEXT NOT NULL, outcome TEXT NOT NULL, PRIMARY KEY (round, number)
);
CREATE TABLE metrics (
    round INTEGER NOT NULL, member TEXT NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
    published_at TEXT NOT NULL, PRIMARY KEY (round, member, name)
);
"""

ADDED = """
CREATE TABLE IF NOT EXISTS cuts (
    member TEXT PRIMARY KEY, lower INTEGER NOT NULL, upper INTEGER NOT NULL
);
"""
"""Tables that stores of the first release lack, and whose readers do not miss them."""


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """What the first member brought, and all must have."""

    fingerprint: dict[str, str]
    layout: dict[str, list[int]]
    member: str
    """Who was first."""


@dataclass(frozen=True, kw_only=True)
class MemberRow:
    """One member."""

    name: str
    joined_at: str
    left_at: str | None
    """None while it is a member."""
    last_seen: str
    """Within about ten seconds."""
    num_rounds: int
    """Rounds that its update is part of."""
    num_straggled: int
    """Rounds whose cohort it was in, but its update came too late or not at all."""
    is_waiting: bool = False
    """It waits for a round now; known only to the running coordinator."""


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One finished round."""

    number: int
    attempts: int
    """How often it was begun."""
    began_at: str
    ended_at: str
    seconds: float
    """From the last beginning to the end."""
    cohort: list[str]
    survivors: list[str]
    """Whose updates are in it."""
    stragglers: list[str]
    """The rest of the cohort."""
    total_weight: int
    """Scored tokens; 0 where the server does not know."""
    bytes_up: int
    """Of the last attempt, as far as they were counted."""
    bytes_down: int
    digest: str
    """End of the chain of rounds, hex."""
    payload_digest: str


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """One beginning of a round."""

    round: int
    number: int
    began_at: str
    ended_at: str | None
    cohort: list[str]
    outcome: str
    """`running`, `finished`, `void` (the server went down), or why it failed."""


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A number that an owner chose to show."""

    round: int
    member: str
    name: str
    value: float
    published_at: str
