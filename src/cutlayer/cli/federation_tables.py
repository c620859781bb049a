"""A federation's members, rounds and published numbers as tables on a terminal. It asks nobody."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cutlayer.cli.output import Output, format_bytes

if TYPE_CHECKING:
    from cutlayer.dashboard.view import MemberView, PublishedView, RoundView

__all__ = [
    "joined_names",
    "print_members",
    "print_published",
    "print_rounds",
    "printable",
    "time_ago",
    "time_span",
]

_MAX_NAMES = 12


def print_members(members: "Sequence[MemberView]", now_s: float, out: Output) -> None:
    """Who takes part, and how."""
    rows = [
        (
            printable(member.name),
            str(member.status),
            str(member.num_rounds),
            str(member.num_missed),
            time_ago(member.last_seen_s, now_s),
        )
        for member in members
    ]
    out.table(("member", "now", "rounds", "missed", "last seen"), rows)


def print_rounds(rounds: "Sequence[RoundView]", out: Output) -> None:
    """Finished rounds."""
    rows = [
        (
            str(r.round),
            "-" if r.seconds is None else f"{r.seconds:.1f} s",
            f"{r.num_survivors} of {r.num_cohort}",
            str(r.num_attempts),
            f"{r.total_weight:,.0f}" if r.total_weight else "-",
            format_bytes(r.bytes_up),
            format_bytes(r.bytes_down),
            joined_names(r.stragglers),
        )
        for r in rounds
    ]
    heads = ("round", "time", "updates", "attempts", "tokens", "up", "down", "stragglers")
    out.table(heads, rows)


def print_published(published: "Sequence[PublishedView]", out: Output) -> None:
    """Each member's newest number of each name."""
    newest = {(p.member, p.name): p for p in published}
    rows = [
        (
            printable(p.member),
            printable(p.name),
            str(p.round),
            "not finite" if p.value is None else f"{p.value:.5g}",
        )
        for p in newest.values()
    ]
    out.table(("published by", "number", "round", "value"), rows)


def printable(text: str) -> str:
    """A peer's text without what steers a terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def joined_names(names: Iterable[str]) -> str:
    """Names on one line; of many, the first."""
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - _MAX_NAMES} more" if len(shown) > _MAX_NAMES else ""
    return ", ".join(shown[:_MAX_NAMES]) + more


def time_ago(then_s: float | None, now_s: float) -> str:
    """For people."""
    return "never" if then_s is None else f"{time_span(max(0.0, now_s - then_s))} ago"


def time_span(seconds: float) -> str:
    """For people."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86_400 else f"{seconds / 86_400:.1f} d"
