"""Many conversations over one engine: begun, cancelled in mid-reply, resumed after a while.

What is resumed gives its prompt and the reply so far anew, as a chat does; the engine keeps some
rows and speculates. Every reply is compared with the prompt's solo run. It starts no process.
"""

import heapq
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.soak_plan import Act, Script, SoakPrompt
from benchmarks.soak_sessions import Tally, sampling_of
from cutlayer import Client
from cutlayer.client.engine import Engine
from cutlayer.client.streams import NewToken, Request, Stream
from cutlayer.errors import CacheFull, CutlayerError

__all__ = ["ConversationSoak"]

_END_WAIT_S = 120.0


@dataclass
class _Talk:
    """One conversation."""

    prompt: int
    before: list[int]
    """The reply before the stream that is under way."""
    stream: Stream | None = None
    error: CutlayerError | None = None


class ConversationSoak:
    """Drives `count` conversations from one thread; the engine has its own."""

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
        self._talks = [_Talk(prompt=script.prompt(), before=[]) for _ in range(count)]
        self._ended = threading.Condition()

    def run(self, seconds: float) -> None:
        """Take turns for so long, then wait for what is under way and close the engine."""
        engine = self._client.engine()
        try:
            end_s = time.monotonic() + seconds
            due = [(0.0, number) for number in range(len(self._talks))]
            while due[0][0] < end_s and time.monotonic() < end_s:
                wake_s, number = heapq.heappop(due)
                time.sleep(max(0.0, wake_s - time.monotonic()))
                heapq.heappush(due, (time.monotonic() + self._turn(engine, number), number))
            self._end_all(engine)
            self.tally.num_replays += engine.status().num_sessions_replayed
        finally:
            engine.close()

    def _turn(self, engine: Engine, number: int) -> float:
        """One act; for how long the conversation is then left alone."""
        talk, act = self._talks[number], self._script.act()
        if talk.stream is None:
            self._submit(engine, talk)
        elif talk.stream.finish is not None:
            self._judge(number)
        elif act is Act.CANCEL:
            engine.cancel(talk.stream)
        return self._script.idle_s() / 4

    def _submit(self, engine: Engine, talk: _Talk) -> None:
        prompt = self._prompts[talk.prompt]
        left = prompt.new_tokens - len(talk.before)
        sampling = sampling_of(prompt).model_copy(update={"max_new_tokens": left})
        request = Request(
            prompt=[*prompt.tokens, *talk.before], sampling=sampling, watch=self._watch
        )
        self.tally.num_streams += 1
        self.tally.num_resumed += bool(talk.before)
        talk.error = None
        talk.stream = engine.submit(request, lambda stream, error: self._tell(talk, error))

    def _watch(self, new: NewToken) -> bool:
        self.tally.num_tokens += 1
        return False

    def _tell(self, talk: _Talk, error: CutlayerError | None) -> None:
        with self._ended:
            talk.error = error
            self._ended.notify_all()

    def _judge(self, number: int) -> None:
        """Compare what has come; go on with it where it was cancelled, else begin anew."""
        talk = self._talks[number]
        assert talk.stream is not None
        prompt, expected = self._prompts[talk.prompt], self._expected[talk.prompt]
        reply = [*talk.before, *talk.stream.tokens]
        is_right = reply == list(expected[: len(reply)])
        self.tally.num_wrong += not is_right
        if isinstance(talk.error, CacheFull):
            self.tally.num_cache_full += 1
        elif talk.error is not None:
            raise talk.error
        is_whole = len(reply) == prompt.new_tokens
        self.tally.num_finished += is_whole and is_right
        self.tally.num_cancelled += not is_whole
        # A sampled reply cannot be resumed: its draws would begin anew.
        can_resume = is_right and not is_whole and prompt.temperature == 0
        chosen = talk.prompt if can_resume else self._script.prompt()
        self._talks[number] = _Talk(prompt=chosen, before=reply if can_resume else [])

    def _end_all(self, engine: Engine) -> None:
        """Cancel one half of what is under way, wait for the rest, and judge all of it."""
        live = [n for n, talk in enumerate(self._talks) if talk.stream is not None]
        for number in live[::2]:
            stream = self._talks[number].stream
            assert stream is not None
            engine.cancel(stream)
        streams = [self._talks[number].stream for number in live]
        with self._ended:
            is_over = self._ended.wait_for(
                lambda: all(stream is None or stream.finish is not None for stream in streams),
                timeout=_END_WAIT_S,
            )
        if not is_over:
            raise RuntimeError(f"streams did not end within {_END_WAIT_S:.0f} s")
        for number in live:
            self._judge(number)
