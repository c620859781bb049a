"""Who waits for a round, and when enough do. It begins none (`coordinator`)."""

import random
from collections.abc import Collection

from cutlayer.federation.settings import FederationSettings

__all__ = ["Gathering"]

_RING_BITS = 63


class Gathering:
    """Members that are there, and those of them that wait."""

    def __init__(self, settings: FederationSettings) -> None:
        self._settings = settings
        self._since_s: float | None = None
        self._is_first = True
        self.waiting: set[str] = set()
        """Who asked for the next round."""
        self.present: set[str] = set()
        """Whose connection is there, and who is not late for an earlier round."""

    def hear(self, member: str) -> None:
        """A member is there."""
        self.present.add(member)

    def forget(self, member: str) -> None:
        """A member is gone: nobody waits for it."""
        self.present.discard(member)
        self.waiting.discard(member)

    def update(self, now_s: float) -> None:
        """Start or stop the time that others get to come."""
        is_enough = len(self.waiting) >= self._settings.min_members
        if not is_enough:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s

    def is_ready(self, now_s: float) -> bool:
        """Whether a round may begin: everybody waits who can, or the time is over."""
        deadline_s = self.deadline_s()
        return deadline_s is not None and (now_s >= deadline_s or self._is_complete())

    def deadline_s(self) -> float | None:
        """When the round begins even if some do not wait; None as long as too few do."""
        return None if self._since_s is None else self._since_s + self._settings.gather_s

    def choose(self, round_number: int, attempt: int) -> list[str]:
        """The cohort, sorted: a seeded sample of who waits."""
        settings, names = self._settings, sorted(self.waiting)
        size = min(settings.cohort or len(names), len(names), _largest_cohort(settings))
        seed = f"{settings.name}|{settings.seed}|{round_number}|{attempt}"
        return sorted(random.Random(seed).sample(names, size))

    def begin(self, cohort: Collection[str]) -> None:
        """These no longer wait."""
        self.waiting.difference_update(cohort)
        self._since_s, self._is_first = None, False

    def _is_complete(self) -> bool:
        """The first time those listed are waited for; later, whoever is there."""
        listed = set(self._settings.members)
        if self._is_first:
            return bool(listed) and listed <= self.waiting
        return self.present <= self.waiting


def _largest_cohort(settings: FederationSettings) -> int:
    """Members whose sum cannot wrap around the ring of secure aggregation."""
    secure = settings.secure
    if not secure.enabled:
        return 1 << 30
    each = secure.max_weight * round(secure.value_range * (1 << secure.value_bits))
    return ((1 << _RING_BITS) - 1) // each
