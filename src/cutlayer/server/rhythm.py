"""When a client that generates will ask for its next token: pure, time is passed in.

A token's way is a circle: the trunk, the link, the owner's tail and head, and back. How long a
client's circle took lately says when it comes again, and so whom it is worth waiting for.
"""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Rhythm"]

_KEEP = 0.7
"""Weight of earlier circles in the mean."""
_JITTER = 0.25
"""A client may come later than expected by this share of its circle."""
_FORGET_S = 10.0
"""A client that had no token made for so long has no rhythm."""


@dataclass
class _Beat:
    began_s: float
    """When its last token was begun."""
    circle_s: float | None = None
    """From the beginning of a token to the request for the next."""
    is_awaited: bool = True
    """Whether its next request has not come yet."""


class Rhythm:
    """One beat per client."""

    def __init__(self) -> None:
        """Nobody generates."""
        self._beats: dict[str, _Beat] = {}

    def arrived(self, client: str, arrived_s: float) -> None:
        """A request for next tokens waits; told again, it changes nothing."""
        beat = self._beats.get(client)
        if beat is None or not beat.is_awaited or arrived_s < beat.began_s:
            return
        beat.is_awaited = False
        took_s = arrived_s - beat.began_s
        last_s = beat.circle_s
        beat.circle_s = took_s if last_s is None else _KEEP * last_s + (1 - _KEEP) * took_s

    def began(self, client: str, now_s: float) -> None:
        """Its tokens are being computed."""
        beat = self._beats.setdefault(client, _Beat(now_s))
        beat.began_s, beat.is_awaited = now_s, True

    def wait_until(
        self, here: Iterable[str], oldest_s: float, patience: float, now_s: float
    ) -> float:
        """Until when those who are here may wait for those who are about to come.

        Args:
            here: clients whose requests wait.
            oldest_s: when the first of them came.
            patience: share of their own circle that they may spend on waiting.
            now_s: the time.

        Returns:
            A time up to `now_s` where nobody is worth waiting for.
        """
        present = set(here)
        circles = [self._beats[c].circle_s for c in present if c in self._beats]
        known = [circle_s for circle_s in circles if circle_s is not None]
        if not known or not patience:
            return now_s
        latest_s = oldest_s + patience * min(known)
        coming = [
            beat.began_s + (1 + _JITTER) * beat.circle_s
            for client, beat in self._beats.items()
            if client not in present
            and beat.is_awaited
            and beat.circle_s is not None
            and beat.began_s + beat.circle_s <= latest_s
        ]
        return min(latest_s, max((s for s in coming if s > now_s), default=now_s))

    def forget(self, now_s: float) -> None:
        """Forget who has long been silent."""
        self._beats = {c: b for c, b in self._beats.items() if now_s - b.began_s < _FORGET_S}
