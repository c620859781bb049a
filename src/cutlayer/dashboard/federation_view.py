"""A federation's store, and what its coordinator knows beyond it, as the page shows them.

It writes nothing and holds no state.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from math import isfinite

from cutlayer.dashboard.view import (
    FederationView,
    MemberStatus,
    MemberView,
    PublishedView,
    RoundView,
)
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.status import Status
from cutlayer.federation.store_reader import StoreReader
from cutlayer.federation.store_rows import MemberRow, MetricRow, RoundRow

__all__ = ["federation_view", "member_views", "published_views", "round_views"]

MAX_ROUNDS = 200
"""Newest rounds that a page shows."""
MAX_PUBLISHED = 4000
"""Newest published numbers that a page shows."""


_PHASES = {
    "keys": "members exchange keys",
    "secrets": "members share secrets",
    "updates": "members train and send their updates",
    "unmask": "opening the sum",
}


def federation_view(
    store: StoreReader, settings: FederationSettings, status: Status
) -> FederationView:
    """The newest rounds and all members of a federation that is being coordinated."""
    rounds = store.rounds(MAX_ROUNDS)
    is_over = status.stage in ("finished", "stopped")
    came = set(status.came)
    return FederationView(
        name=settings.name,
        strategy=settings.strategy.kind,
        is_secure=settings.secure.enabled,
        hides_aggregate=settings.secure.hides_aggregate,
        num_rounds=settings.rounds,
        round=status.round if is_over else status.round + 1,
        attempt=status.attempt,
        phase=_phase(status, settings),
        waits_for=() if is_over else tuple(n for n in status.cohort if n not in came),
        is_finished=status.stage == "finished",
        stopped=status.stopped,
        members=member_views(store.members(), rounds, status),
        rounds=round_views(rounds),
        published=published_views(store.metrics(MAX_ROUNDS)),
    )


def member_views(
    members: Sequence[MemberRow], rounds: Sequence[RoundRow], status: Status | None
) -> tuple[MemberView, ...]:
    """Members with what each is doing; `status` is None where no coordinator is asked."""
    late = set(rounds[-1].stragglers) if rounds else set()
    return tuple(
        MemberView(
            name=member.name,
            status=_doing(member, late, status),
            num_rounds=member.num_rounds,
            num_missed=member.num_straggled,
            last_seen_s=_unix(member.last_seen),
        )
        for member in members
    )


def round_views(rounds: Sequence[RoundRow]) -> tuple[RoundView, ...]:
    """Finished rounds."""
    return tuple(
        RoundView(
            round=row.number,
            num_survivors=len(row.survivors),
            num_cohort=len(row.cohort),
            stragglers=tuple(row.stragglers),
            num_attempts=row.attempts,
            seconds=row.seconds,
            total_weight=row.total_weight,
            bytes_up=row.bytes_up,
            bytes_down=row.bytes_down,
            ended_s=_unix(row.ended_at),
        )
        for row in rounds
    )


def published_views(metrics: Sequence[MetricRow]) -> tuple[PublishedView, ...]:
    """Numbers that members chose to show, the newest ones."""
    return tuple(
        PublishedView(
            member=row.member,
            round=row.round,
            name=row.name,
            value=row.value if isfinite(row.value) else None,
        )
        for row in metrics[-MAX_PUBLISHED:]
    )


def _phase(status: Status, settings: FederationSettings) -> str:
    if status.stage == "gathering":
        return f"{len(status.waiting)} members wait, {settings.min_members} are needed"
    return _PHASES.get(status.stage, status.stage)


def _doing(member: MemberRow, late: Collection[str], status: Status | None) -> MemberStatus:
    if member.left_at is not None:
        return MemberStatus.LEFT
    if status is None:
        return MemberStatus.JOINED
    has_sent = status.stage == "updates" and member.name in status.came
    if member.name in status.waiting or has_sent:
        return MemberStatus.WAITING
    if member.name in status.cohort:
        return MemberStatus.TRAINING
    return MemberStatus.STRAGGLER if member.name in late else MemberStatus.AWAY


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
