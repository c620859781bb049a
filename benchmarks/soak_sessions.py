"""Many sessions of one client, each by itself at the server: opened, idle, resumed, cancelled.

Every token is compared with the prompt's solo run as it comes. It starts no process.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.soak_plan import Act, Script, SoakPrompt
from cutlayer import Client
from cutlayer.client.sampling import RowSampler
from cutlayer.client.session import Feed, GenerationSession
from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import CacheFull

__all__ = ["SessionSoak", "Tally", "sampling_of", "solo_replies"]

_LEAST_WAIT_S = 0.05
_ABANDON_EVERY = 10
"""Of so many cancelled sessions one is left open at the server, as by a client that is gone."""


@dataclass
class Tally:
    """What happened."""

    num_streams: int = 0
    """Streams begun."""
    num_wrong: int = 0
    """Streams with a token that their solo run does not have there."""
    num_finished: int = 0
    num_cancelled: int = 0
    num_resumed: int = 0
    num_replays: int = 0
    num_cache_full: int = 0
    num_tokens: int = 0


@dataclass
class _Slot:
    """One of the sessions."""

    prompt: int
    session: GenerationSession | None
    row: int
    sampler: RowSampler
    reply: list[int] = field(default_factory=list)
    is_idle: bool = False


def sampling_of(prompt: SoakPrompt) -> SamplingSettings:
    """How the prompt's tokens are chosen."""
    return SamplingSettings(
        max_new_tokens=prompt.new_tokens, temperature=prompt.temperature, seed=prompt.seed
    )


def solo_replies(client: Client, prompts: Sequence[SoakPrompt]) -> list[list[int]]:
    """What each prompt is continued with, nothing else under way."""
    return [client.generate_ids([p.tokens], sampling_of(p))[0] for p in prompts]


class SessionSoak:
    """Drives `count` sessions from one thread, one session's turn after the other."""

    def __init__(
        self,
        client: Client,
        prompts: Sequence[SoakPrompt],
        expected: Sequence[Sequence[int]],
        script: Script,
        count: int,
    ) -> None:
        self._client, self._prompts, self._expected = client, prompts, expected
        self._script = script
        self.tally = Tally()
        self._slots = [self._begin() for _ in range(count)]

    def run(self, seconds: float) -> None:
        """Take turns for so long, then close everything."""
        end_s = time.monotonic() + seconds
        due = [(0.0, number) for number in range(len(self._slots))]
        while due[0][0] < end_s and time.monotonic() < end_s:
            wake_s, number = heapq.heappop(due)
            time.sleep(max(0.0, wake_s - time.monotonic()))
            heapq.heappush(due, (time.monotonic() + self._turn(number), number))
        for slot in self._slots:
            self._close(slot)

    def _begin(self) -> _Slot:
        number = self._script.prompt()
        prompt, session = self._prompts[number], self._client.session()
        self.tally.num_streams += 1
        return _Slot(
            prompt=number,
            session=session,
            row=session.open_row(len(prompt.tokens) + prompt.new_tokens),
            sampler=RowSampler(sampling_of(prompt), 0),
        )

    def _turn(self, number: int) -> float:
        """One act of a session; for how long it is then left alone."""
        slot, act = self._slots[number], self._script.act()
        if act is Act.IDLE:
            slot.is_idle = bool(slot.reply)
            return self._script.idle_s()
        if act is Act.CANCEL and slot.reply:
            self.tally.num_cancelled += 1
            self._end(number)
            return 0.0
        self.tally.num_resumed += slot.is_idle
        slot.is_idle = False
        try:
            self._go_on(number, self._script.num_tokens())
        except CacheFull as error:
            self.tally.num_cache_full += 1
            return max(_LEAST_WAIT_S, error.retry_after_s or 0.0)
        return 0.0

    def _go_on(self, number: int, num_tokens: int) -> None:
        slot = self._slots[number]
        prompt, expected = self._prompts[slot.prompt], self._expected[slot.prompt]
        assert slot.session is not None
        for _ in range(num_tokens):
            known = [*prompt.tokens, *slot.reply]
            feed = Feed(row=slot.row, tokens=known[slot.session.length(slot.row) :])
            (logits_1V,) = slot.session.step([feed])
            slot.reply.append(slot.sampler.next_token(logits_1V[0], known))
            self.tally.num_tokens += 1
            if slot.reply != list(expected[: len(slot.reply)]):
                self.tally.num_wrong += 1
                return self._end(number)
            if len(slot.reply) == prompt.new_tokens:
                self.tally.num_finished += 1
                return self._end(number)
        return None

    def _end(self, number: int) -> None:
        is_abandoned = self.tally.num_cancelled % _ABANDON_EVERY == 1
        self._close(self._slots[number], is_abandoned=is_abandoned)
        self._slots[number] = self._begin()

    def _close(self, slot: _Slot, *, is_abandoned: bool = False) -> None:
        if slot.session is None:
            return
        self.tally.num_replays += slot.session.num_replays
        if not is_abandoned:
            slot.session.close()
        slot.session = None
