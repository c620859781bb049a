"""Which replica serves which client: pure, no threads, no clock of its own.

It does not start replicas (`replica_group`) nor move a client's state: whoever places a client on
another replica has it open its run there again.
"""

from dataclasses import dataclass

__all__ = ["Placement"]


@dataclass
class _Place:
    """Where a client was put."""

    replica: int
    seen_s: float


@dataclass
class _Load:
    """What an up replica computed lately."""

    last_total: int = 0
    recent_tokens: float = 0.0
    noted_s: float = 0.0


class Placement:
    """Sticky by client; a new client goes to the least loaded replica.

    A replica's load is its share of all placed clients plus its share of all recent tokens, so
    from 0 to 2: clients count before they send anything, and a busy client counts for more.
    """

    def __init__(self, half_life_s: float = 60.0, idle_s: float = 86_400.0) -> None:
        """Nothing is up yet.

        Args:
            half_life_s: after so long a token counts half.
            idle_s: a client that was not placed again for so long counts as load no more. It
                keeps its replica: it may be connected there all the time.
        """
        self._half_life_s = half_life_s
        self._idle_s = idle_s
        self._loads: dict[int, _Load] = {}
        self._places: dict[str, _Place] = {}

    @property
    def up(self) -> list[int]:
        """Replicas that can serve, ascending."""
        return sorted(self._loads)

    def mark_up(self, replica: int, now_s: float) -> None:
        """A replica serves; it has computed nothing yet."""
        self._loads[replica] = _Load(noted_s=now_s)

    def mark_down(self, replica: int) -> list[str]:
        """A replica is gone; the clients that have no place now, sorted."""
        self._loads.pop(replica, None)
        lost = sorted(name for name, place in self._places.items() if place.replica == replica)
        for name in lost:
            del self._places[name]
        return lost

    def place(self, client: str, now_s: float) -> int | None:
        """The client's replica, chosen now if it has none; None where no replica is up."""
        if not self._loads:
            return None
        known = self._places.get(client)
        replica = self._least_loaded(now_s) if known is None else known.replica
        self._places[client] = _Place(replica=replica, seen_s=now_s)
        return replica

    def clients_of(self, replica: int) -> list[str]:
        """Who is placed on a replica, sorted."""
        return sorted(name for name, place in self._places.items() if place.replica == replica)

    def note_tokens(self, replica: int, total: int, now_s: float) -> None:
        """Tokens that a replica has computed since it started; a smaller number is a new start."""
        load = self._loads.get(replica)
        if load is None:
            return
        new = total - load.last_total if total >= load.last_total else total
        load.recent_tokens = self._recent(load, now_s) + new
        load.last_total, load.noted_s = total, now_s

    def load(self, replica: int, now_s: float) -> float:
        """Share of placed clients plus share of recent tokens, 0 to 2."""
        recent = {index: self._recent(load, now_s) for index, load in self._loads.items()}
        active = [p.replica for p in self._places.values() if now_s - p.seen_s <= self._idle_s]
        clients = active.count(replica) / max(1, len(active))
        tokens = recent[replica] / max(1.0, sum(recent.values()))
        return clients + tokens

    def _least_loaded(self, now_s: float) -> int:
        return min(self.up, key=lambda replica: (self.load(replica, now_s), replica))

    def _recent(self, load: _Load, now_s: float) -> float:
        age_s = max(0.0, now_s - load.noted_s)
        return float(load.recent_tokens * 0.5 ** (age_s / self._half_life_s))
