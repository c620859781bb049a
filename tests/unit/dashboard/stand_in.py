"""A server's view with settled numbers, for tests of the page. It serves nothing."""

from dataclasses import replace

from cutlayer.dashboard.view import (
    FederationView,
    MemberStatus,
    MemberView,
    PublishedView,
    ReplicaView,
    RoundView,
    RunView,
    Snapshot,
)
from cutlayer.errors import StorageError
from cutlayer.metrics import Totals

__all__ = ["HOSTILE", "StandInView", "snapshot"]

NOW_S = 1_800_000_000.0
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;\u202eevil'
"""A name that no certificate of ours can carry."""
MEMBERS = ("amazon", "movies", "nyt", "tweets")


class StandInView:
    """Implements `ServerView`; tests change its fields."""

    def __init__(self, state: Snapshot | None = None) -> None:
        self.state = snapshot() if state is None else state
        self.ready = True
        self.is_broken = False

    def is_ready(self) -> bool:
        """As set."""
        return self.ready

    def metrics(self) -> bytes:
        """One line."""
        return b"cutlayer_federation_rounds_total 6.0\n"

    def totals(self) -> Totals:
        """Of the snapshot."""
        return self.state.totals

    def snapshot(self) -> Snapshot:
        """As set, or an error as of a full disk."""
        if self.is_broken:
            raise StorageError("cannot read the store: no space left")
        return self.state


def snapshot(num_rounds: int = 6, hostile: bool = False) -> Snapshot:
    """Four owners in round `num_rounds + 1` of 20; one of them may have a hostile name."""
    first = HOSTILE if hostile else MEMBERS[0]
    names = (first, *MEMBERS[1:])
    return Snapshot(
        software="cutlayer 0.1.0",
        time_s=NOW_S,
        uptime_s=93_784.0,
        is_ready=True,
        num_connections=4,
        num_sessions=2,
        cache_bytes=48_000_000,
        graph_bytes=210_000_000,
        totals=Totals(tokens=1_234_567, bytes_up=2.5e9, bytes_down=2.4e9),
        runs=tuple(
            RunView(owner=name, run_id=f"reviews.r{num_rounds + 1}.a1", step=3) for name in names
        ),
        replicas=(
            ReplicaView(name="replica 0", is_alive=True, members=names[:2]),
            ReplicaView(name="replica 1", is_alive=False, members=names[2:], num_restarts=1),
        ),
        federation=_federation(names, num_rounds),
    )


def without_federation() -> Snapshot:
    """A server that serves single owners."""
    return replace(snapshot(), federation=None, runs=(), replicas=())


def _federation(names: tuple[str, ...], num_rounds: int) -> FederationView:
    return FederationView(
        name="reviews",
        strategy="fedavg",
        is_secure=True,
        hides_aggregate=False,
        num_rounds=20,
        round=num_rounds + 1,
        attempt=2,
        phase="members train and send their updates",
        waits_for=(names[0],),
        members=_members(names, num_rounds),
        rounds=tuple(_round(number, names) for number in range(1, num_rounds + 1)),
        published=tuple(
            PublishedView(member=name, round=number, name="loss", value=_loss(index, number))
            for number in range(1, num_rounds + 1)
            for index, name in enumerate((names[0], names[2]))
        ),
    )


def _members(names: tuple[str, ...], num_rounds: int) -> tuple[MemberView, ...]:
    statuses = (
        MemberStatus.TRAINING,
        MemberStatus.WAITING,
        MemberStatus.LEFT,
        MemberStatus.STRAGGLER,
    )
    return tuple(
        MemberView(
            name=name,
            status=status,
            num_rounds=num_rounds - index,
            num_missed=index,
            last_seen_s=NOW_S - 40 * index,
        )
        for index, (name, status) in enumerate(zip(names, statuses, strict=True))
    )


def _round(number: int, names: tuple[str, ...]) -> RoundView:
    late = (names[3],) if number % 4 == 3 else ()
    return RoundView(
        round=number,
        num_survivors=4 - len(late),
        num_cohort=4,
        stragglers=late,
        num_attempts=2 if late else 1,
        seconds=41.0 + 7 * (number * 37 % 5) + 30 * len(late),
        total_weight=48_213 + 17 * number,
        bytes_up=3_400_000 + 900 * number,
        bytes_down=2_900_000,
        ended_s=NOW_S - 70 * (20 - number),
    )


def _loss(index: int, number: int) -> float:
    return 2.6 * 0.86**number + 0.4 + 0.3 * index + 0.03 * (number * 7 % 3)
