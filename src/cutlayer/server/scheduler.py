"""Which waiting request runs next: pure, no threads, no clock of its own.

It does not know frames or tensors. Requests of one client stay in their order: the sums of a
step's gradients, and so its bits, depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["FairScheduler", "Scheduler", "Waiting"]


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What a scheduler may know of a request."""

    client: str
    arrived_s: float
    num_tokens: int
    """Tokens that it computes; 0 for bookkeeping."""


class Scheduler(Protocol):
    """Chooses the next call of the trunk."""

    def next_batch(self, waiting: Sequence[Waiting], now_s: float) -> list[int]:
        """Indices into `waiting` of the requests to run together; `waiting` is not empty."""


class FairScheduler:
    """One request at a time, of the client that has computed the fewest tokens lately.

    A client's count halves every `half_life_s`, so that one who was idle gets no long monopoly.
    """

    def __init__(self, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        self._tokens: dict[str, float] = {}
        self._updated_s = 0.0

    def next_batch(self, waiting: Sequence[Waiting], now_s: float) -> list[int]:
        """The oldest request of the least served client."""
        self._decay(now_s)
        first_of: dict[str, int] = {}
        for index, request in enumerate(waiting):
            first_of.setdefault(request.client, index)
        chosen = min(
            first_of.values(),
            key=lambda i: (self._tokens.get(waiting[i].client, 0.0), waiting[i].arrived_s),
        )
        client = waiting[chosen].client
        self._tokens[client] = self._tokens.get(client, 0.0) + waiting[chosen].num_tokens
        return [chosen]

    def _decay(self, now_s: float) -> None:
        factor = 0.5 ** (max(0.0, now_s - self._updated_s) / self._half_life_s)
        decayed = {client: tokens * factor for client, tokens in self._tokens.items()}
        self._tokens = {client: tokens for client, tokens in decayed.items() if tokens > 0.5}
        self._updated_s = now_s
