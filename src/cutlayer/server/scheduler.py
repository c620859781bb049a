"""Which waiting requests run next, and which of them together: pure, no threads, no clock.

It does not know frames or tensors. Requests of one client stay in their order, and two requests of
one client never share a call: the sums of a step's gradients, and so its bits, depend on both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from cutlayer.server.rhythm import Rhythm
from cutlayer.server.settings import BatchSettings

__all__ = ["BatchScheduler", "Choice", "FairScheduler", "Scheduler", "Waiting", "WorkKind"]

_ACTIVE_S = 1.0
"""A client that asked for nothing for so long is not waited for."""
_DECODING_S = 0.1
"""A client that had no token made for so long does not generate: no decode waits for it."""
_SHORT_TOKENS = 64
"""A DECODE of no more tokens is next tokens of some streams, guesses included; more is a prompt."""
_MAX_PROGRESS_WINDOWS = 10
"""Gradients that trickle in prolong their window at most this often."""
_MAX_ALONE = 64
_LEAST_TOKENS = 16
"""What a call counts as, however few tokens it has: the trunk reads all its weights for it."""
_BOOKKEEPING_TOKENS = 64
"""What bookkeeping counts as: or who asks for nothing else would always come first."""


class WorkKind(StrEnum):
    """What may share a call of the trunk: requests of one kind."""

    FORWARD = "forward"
    EVALUATE = "evaluate"
    BACKWARD = "backward"
    DECODE = "decode"
    OTHER = "other"
    """Bookkeeping, which runs alone."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What a scheduler may know of a request."""

    client: str
    """Whose it is; empty for the server's own."""
    arrived_s: float
    num_tokens: int
    """Tokens that it still has to compute; 0 for bookkeeping."""
    kind: WorkKind = WorkKind.OTHER
    has_begun: bool = False
    """DECODE: the first of its pieces has been computed."""
    graph: int | None = None
    """BACKWARD: the joint forward that it belongs to; None if its activations are gone."""
    expected: frozenset[str] = frozenset()
    """BACKWARD: connected clients of that forward whose gradients have not been used yet."""


@dataclass(frozen=True)
class Choice:
    """What to do now."""

    indices: tuple[int, ...]
    """Requests to run together; empty means wait."""
    num_tokens: tuple[int, ...] = ()
    """How many of each one's tokens; fewer than it has for a long DECODE, whose rest waits on."""
    wait_until_s: float = math.inf
    """When to ask again, if nothing else happens before."""


class Scheduler(Protocol):
    """Chooses the next call of the trunk."""

    def next_batch(self, waiting: Sequence[Waiting], now_s: float) -> Choice:
        """Requests to run together, or until when to wait; `waiting` is not empty."""


@dataclass
class _Group:
    """Requests that could run in one call, least served client first."""

    indices: list[int]
    ready_s: float
    """When it need not wait any longer."""
    missing: set[str] = field(default_factory=set)
    num_tokens: list[int] | None = None
    """Of each request; None is all."""


class BatchScheduler:
    """Client batches: requests of one kind, one per client, led by the least served client.

    A forward waits up to `window_ms` for other clients that were active within the last second;
    a backward up to `backward_window_ms`, from the newest gradient that came, for the others of
    its joint forward. Who keeps the others waiting in vain runs its forwards alone for a while.
    A client's count of tokens halves every `half_life_s`, so that one who was idle gets no long
    monopoly. With `max_clients=1` this is one request at a time.

    Short decodes of all clients run together with one piece of the prompts that wait: a long prompt
    is computed piece by piece, and nobody's next token waits for more than one of them. A decode
    waits for clients that are about to ask for their next tokens (`rhythm`).
    """

    def __init__(self, settings: BatchSettings, half_life_s: float = 10.0) -> None:
        self._settings = settings
        self._half_life_s = half_life_s
        self._tokens: dict[str, float] = {}
        self._updated_s = 0.0
        self._seen_s: dict[str, float] = {}
        self._decoded_s: dict[str, float] = {}
        self._rhythm = Rhythm()
        self._riders: set[str] = set()
        self._decode_began_s = self._decode_ended_s = 0.0
        self._strikes: dict[str, int] = {}
        self._alone: dict[str, int] = {}

    def next_batch(self, waiting: Sequence[Waiting], now_s: float) -> Choice:
        """The ready group with the least served client, or the time when one will be ready."""
        self._note_end(waiting, now_s)
        self._age(waiting, now_s)
        heads: dict[str, int] = {}
        for index, request in enumerate(waiting):
            heads.setdefault(request.client, index)
        ranked = sorted(heads.values(), key=lambda i: self._rank(waiting[i]))
        groups = list(self._groups(waiting, ranked, now_s))
        ready = [group for group in groups if group.ready_s <= now_s]
        if not ready:
            return Choice((), wait_until_s=min(group.ready_s for group in groups))
        chosen = min(ready, key=lambda group: self._rank(waiting[group.indices[0]]))
        tokens = chosen.num_tokens or [waiting[index].num_tokens for index in chosen.indices]
        self._account(waiting, chosen, tokens, now_s)
        return Choice(tuple(chosen.indices), tuple(tokens))

    def _groups(
        self, waiting: Sequence[Waiting], ranked: Sequence[int], now_s: float
    ) -> Iterable[_Group]:
        pools: dict[tuple[WorkKind, int | None], list[int]] = {}
        for index in ranked:
            request = waiting[index]
            if request.kind is WorkKind.OTHER or self._is_alone(request):
                yield _Group([index], request.arrived_s)
            else:
                pools.setdefault((request.kind, request.graph), []).append(index)
        for (kind, graph), indices in pools.items():
            if kind is WorkKind.DECODE:
                yield self._decode_group(waiting, indices, ranked, now_s)
                continue
            chosen = self._within_limits(waiting, indices)
            is_full = len(chosen) < len(indices)
            if kind is WorkKind.BACKWARD and graph is not None:
                yield self._backward_group(waiting, chosen)
            elif is_full or kind is WorkKind.BACKWARD:
                yield _Group(chosen, 0.0)
            else:
                yield self._forward_group(waiting, chosen, ranked)

    def _forward_group(
        self, waiting: Sequence[Waiting], chosen: list[int], heads: Sequence[int]
    ) -> _Group:
        here = {waiting[index].client for index in heads}
        oldest_s = min(waiting[index].arrived_s for index in chosen)
        others = self._seen_s.keys() - here - self._alone.keys()
        if not others or self._is_full(waiting, chosen):
            return _Group(chosen, oldest_s)
        return _Group(chosen, oldest_s + self._settings.window_ms / 1000)

    def _backward_group(self, waiting: Sequence[Waiting], chosen: list[int]) -> _Group:
        here = {waiting[index].client for index in chosen}
        missing = set(waiting[chosen[0]].expected) - here
        arrivals_s = [waiting[index].arrived_s for index in chosen]
        if not missing:
            return _Group(chosen, min(arrivals_s))
        window_s = self._settings.backward_window_ms / 1000
        # A deadline that moves with progress, but not for ever.
        last_s = min(max(arrivals_s), min(arrivals_s) + (_MAX_PROGRESS_WINDOWS - 1) * window_s)
        return _Group(chosen, last_s + window_s, missing)

    def _decode_group(
        self,
        waiting: Sequence[Waiting],
        indices: Sequence[int],
        heads: Sequence[int],
        now_s: float,
    ) -> _Group:
        chosen = self._pieces(waiting, indices)
        group = _Group(list(chosen), 0.0, num_tokens=list(chosen.values()))
        here = {waiting[index].client for index in heads}
        is_full = len(chosen) >= self._settings.max_clients or len(chosen) < len(indices)
        patience = self._settings.decode_patience
        if is_full or not patience:
            return group
        if not any(waiting[index].has_begun for index in chosen):
            oldest_s = min(waiting[index].arrived_s for index in chosen)
            group.ready_s = self._rhythm.wait_until(here, oldest_s, patience, now_s)
        elif self._decoded_s.keys() - here:
            # Whoever rode along with the last piece may have the next token ready in a moment.
            took_s = self._decode_ended_s - self._decode_began_s
            group.ready_s = self._decode_ended_s + took_s / 10
        return group

    def _note_end(self, waiting: Sequence[Waiting], now_s: float) -> None:
        """Asked while a prompt waits for its next piece, the last call has just ended."""
        if self._riders and any(request.has_begun for request in waiting):
            self._decoded_s.update(dict.fromkeys(self._riders, now_s))
            self._decode_ended_s = now_s
        self._riders = set()

    def _pieces(self, waiting: Sequence[Waiting], indices: Sequence[int]) -> dict[int, int]:
        """Tokens of each request of the next decode, least served client first."""
        most = min(self._settings.prefill_tokens, self._max_tokens())
        is_short = {index: waiting[index].num_tokens <= _SHORT_TOKENS for index in indices}
        if any(is_short.values()) and not all(is_short.values()):
            # Room for who waits for one token, however long the piece could be.
            most = int(min(most, max(1, self._max_tokens() / 2)))
        left, prefill_left = self._max_tokens(), most
        chosen: dict[int, int] = {}
        for index in indices:
            wanted = waiting[index].num_tokens
            if not is_short[index] and wanted > prefill_left + most / 4:
                wanted = int(prefill_left)
                # Few tokens are not worth a place; and above, a short rest no call of its own.
                if wanted < min(_LEAST_TOKENS, most):
                    continue
            if chosen and wanted > left:
                continue
            chosen[index] = wanted
            left -= wanted
            prefill_left -= 0 if is_short[index] else wanted
            if len(chosen) == self._settings.max_clients:
                break
        return chosen

    def _within_limits(self, waiting: Sequence[Waiting], indices: Sequence[int]) -> list[int]:
        """The first requests whose tokens fit into one call; always at least one."""
        chosen, num_tokens = [indices[0]], waiting[indices[0]].num_tokens
        for index in indices[1 : self._settings.max_clients]:
            num_tokens += waiting[index].num_tokens
            if num_tokens > self._max_tokens():
                break
            chosen.append(index)
        return chosen

    def _is_full(self, waiting: Sequence[Waiting], chosen: Sequence[int]) -> bool:
        num_tokens = sum(waiting[index].num_tokens for index in chosen)
        return len(chosen) >= self._settings.max_clients or num_tokens >= self._max_tokens()

    def _max_tokens(self) -> float:
        limit = self._settings.max_tokens
        return math.inf if limit is None else limit

    def _is_alone(self, request: Waiting) -> bool:
        return request.kind is WorkKind.FORWARD and request.client in self._alone

    def _rank(self, request: Waiting) -> tuple[float, float]:
        return self._tokens.get(request.client, 0.0), request.arrived_s

    def _account(
        self, waiting: Sequence[Waiting], chosen: _Group, tokens: Sequence[int], now_s: float
    ) -> None:
        for index, num_tokens in zip(chosen.indices, tokens, strict=True):
            request = waiting[index]
            client = request.client
            self._tokens[client] = self._tokens.get(client, 0.0) + _cost(request, num_tokens)
            if request.kind is WorkKind.DECODE:
                self._decoded_s[client] = self._decode_began_s = now_s
                self._rhythm.began(client, now_s)
                self._riders.add(client)
            if self._is_alone(request):
                self._alone[client] -= 1
                if not self._alone[client]:
                    del self._alone[client]
            elif request.kind is WorkKind.BACKWARD and len(request.expected) > 1:
                self._strikes.pop(client, None)
        for client in chosen.missing:
            self._strikes[client] = self._strikes.get(client, 0) + 1
            self._alone[client] = min(_MAX_ALONE, 2 ** self._strikes[client])

    def _age(self, waiting: Sequence[Waiting], now_s: float) -> None:
        factor = 0.5 ** (max(0.0, now_s - self._updated_s) / self._half_life_s)
        decayed = {client: tokens * factor for client, tokens in self._tokens.items()}
        self._tokens = {client: tokens for client, tokens in decayed.items() if tokens > 0.5}
        self._updated_s = now_s
        for request in waiting:
            if request.kind is not WorkKind.OTHER:
                self._seen_s[request.client] = now_s
            if request.kind is WorkKind.DECODE:
                self._rhythm.arrived(request.client, request.arrived_s)
        self._rhythm.forget(now_s)
        self._seen_s = {c: s for c, s in self._seen_s.items() if now_s - s < _ACTIVE_S}
        recent = self._decoded_s.items()
        self._decoded_s = {c: s for c, s in recent if now_s - s < _DECODING_S}


def _cost(request: Waiting, num_tokens: int) -> int:
    """What so many tokens of a request count as."""
    if not request.client:
        return 0
    if request.kind is WorkKind.OTHER and not num_tokens:
        return _BOOKKEEPING_TOKENS
    return max(_LEAST_TOKENS, num_tokens)


class FairScheduler(BatchScheduler):
    """One request at a time, of the client that has computed the fewest tokens lately."""

    def __init__(self, half_life_s: float = 10.0) -> None:
        super().__init__(BatchSettings(max_clients=1), half_life_s)
