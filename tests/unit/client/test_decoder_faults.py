"""Generation against servers that lose, refuse and lie: each stream ends right, or says why not."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from cutlayer import Client
from cutlayer.client.decoder import Decoder
from cutlayer.client.drafting import Draft
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import Finish, Request, Stream
from cutlayer.errors import (
    BudgetExceeded,
    CacheFull,
    CutlayerError,
    SessionLost,
    TransportError,
)
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Decode
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

REPEATING = [65, 66, 67, 68, 69] * 5
_NO_GUESSES: dict[str, object] = {"generation__speculation": {"kind": "none"}}

Fault = Callable[[Decode], CutlayerError | None]


class FaultyChannel:
    """Answers some decodes itself; they do not reach the server."""

    def __init__(self, channel: Channel, world: "World") -> None:
        self._channel = channel
        self._world = world

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        if isinstance(frame.header, Decode):
            self._world.num_decodes += 1
            error = self._world.fault(frame.header)
            if error is not None:
                failed: Future[Frame] = Future()
                failed.set_exception(error)
                return failed
        return self._channel.call(frame, deadline_s)

    def close(self) -> None:
        self._channel.close()


class World:
    """An owner with a decoder, and what goes wrong between it and its server."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.num_decodes = 0
        self.fault: Fault = lambda header: None
        link = client.trunk._link
        connect = link._connect
        link._connect = lambda place: FaultyChannel(connect(place), self)
        link._drop_channel()
        generator = client.generator()
        self.session = generator.session()
        self.decoder: Decoder = generator.decoder(self.session)

    def ask(self, prompt: list[int], num_new: int = 10, **options: object) -> Stream:
        sampling = SamplingSettings(max_new_tokens=num_new)
        return self.decoder.add(
            Request(prompt=prompt, sampling=sampling, **options)  # type: ignore[arg-type]
        )

    def fail_once(self, *errors: CutlayerError) -> None:
        """Answer the next decodes with these."""
        left = list(errors)
        self.fault = lambda header: left.pop(0) if left else None

    def right(self, prompt: list[int], num_new: int = 10) -> list[int]:
        """What comes without faults."""
        self.fault = lambda header: None
        sampling = SamplingSettings(max_new_tokens=num_new)
        return self.client.generate_ids([prompt], sampling)[0]


@contextmanager
def world(tmp_path: Path, **changes: object) -> Iterator[World]:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path, **changes)) as client,
    ):
        made = World(client)
        try:
            yield made
        finally:
            made.decoder.close()


def _lost(*rows: int) -> SessionLost:
    error = SessionLost("no such session here")
    error.lost_rows = rows
    return error


def _full(retry_after_s: float) -> CacheFull:
    error = CacheFull("no room")
    error.retry_after_s = retry_after_s
    return error


@pytest.mark.parametrize("rows", [(), (0,), (1,), (0, 1)])
def test_a_replay_that_is_lost_too_is_sent_again(tmp_path: Path, rows: tuple[int, ...]) -> None:
    with world(tmp_path, **_NO_GUESSES) as owner:
        streams = [owner.ask(REPEATING), owner.ask([90, 91])]
        for _ in range(3):
            owner.decoder.step()
        owner.fail_once(_lost(), _lost(*rows), _lost(), _lost(*rows))
        owner.decoder.finish(streams)
        assert streams[0].tokens == owner.right(REPEATING)
        assert streams[1].tokens == owner.right([90, 91])


def test_a_server_that_always_loses_is_given_up(tmp_path: Path) -> None:
    with world(tmp_path, **_NO_GUESSES) as owner:
        streams = [owner.ask(REPEATING), owner.ask([90, 91])]
        owner.decoder.step()
        before = owner.num_decodes
        owner.fault = lambda header: _lost()
        while owner.decoder.step() is not None:
            pass
        assert owner.num_decodes - before < 40
        assert all(isinstance(stream.error, SessionLost) for stream in streams)
        again = owner.ask(REPEATING)
        owner.fault = lambda header: None
        owner.decoder.finish([again])
        assert again.tokens == owner.right(REPEATING)


def test_rows_that_no_call_named_are_not_replayed(tmp_path: Path) -> None:
    with world(tmp_path, **_NO_GUESSES) as owner:
        stream, other = owner.ask(REPEATING), owner.ask([90, 91])
        owner.decoder.step()
        owner.fault = lambda header: _lost(7, 99) if 0 in header.rows else None
        while owner.decoder.step() is not None:
            pass
        assert isinstance(stream.error, SessionLost)
        assert other.tokens == owner.right([90, 91])


@pytest.mark.parametrize("kept", [0, 8])
def test_a_budget_that_ends_in_a_long_prompt_ends_that_stream_alone(
    tmp_path: Path, kept: int
) -> None:
    changes = {
        "generation__prefill_tokens": 4,
        "generation__keep_rows": kept,
        "generation__max_streams": 1,
        "privacy__generation": {"max_session_vectors": 14},
    }
    with world(tmp_path, **_NO_GUESSES, **changes) as owner:
        long, short = owner.ask([*range(30, 60)]), owner.ask([90, 91])
        while owner.decoder.step() is not None:
            pass
        assert isinstance(long.error, BudgetExceeded)
        assert long.tokens == []
        assert short.finish is Finish.LENGTH
        # What is kept is what is cached.
        again = owner.ask([*range(30, 41), 7], 1)
        owner.decoder.finish([again])
        assert again.num_cached == (4 if kept else 0)


class AlwaysWrong:
    """Guesses, and as many as it may."""

    def propose(self, tokens: Sequence[int], num_tokens: int) -> Draft:
        return Draft((3,) * num_tokens)

    def close(self) -> None:
        pass

    def next(self, num_streams: int = 1) -> int:
        return 4

    def observe(self, num_drafted: int, num_accepted: int, seconds: float) -> None:
        pass


def test_guesses_do_not_end_a_conversation_before_its_budget(tmp_path: Path) -> None:
    budget = {"max_session_vectors": 25 + 5 + 3}
    with world(tmp_path, **_NO_GUESSES, privacy__generation=budget) as owner:
        stream = owner.ask(REPEATING, 40)
        owner.decoder.step()
        (live,) = owner.decoder._live
        live.drafter = live.draft_length = AlwaysWrong()  # type: ignore[assignment]
        with pytest.raises(BudgetExceeded):
            owner.decoder.finish([stream])
        assert stream.num_drafted == 4
        # One of the prompt, one of the round with guesses, three that stood alone.
        assert stream.tokens == owner.right(REPEATING, 5)


@pytest.mark.parametrize("retry_after_s", [float("nan"), float("inf"), -1.0, 0.0, 1e300])
def test_a_server_cannot_make_a_stream_wait_for_ever(tmp_path: Path, retry_after_s: float) -> None:
    with world(tmp_path, **_NO_GUESSES) as owner:
        stream = owner.ask(REPEATING)
        owner.fault = lambda header: _full(retry_after_s)
        owner.decoder.step()
        pause_s = owner.decoder.step()
        assert pause_s is not None
        assert 0.001 <= pause_s <= 5
        assert not stream.has_ended


def test_a_deadline_ends_a_stream_that_waits_for_room(tmp_path: Path) -> None:
    with world(tmp_path, **_NO_GUESSES) as owner:
        owner.fault = lambda header: _full(5.0)
        began_s = time.monotonic()
        stream = owner.ask(REPEATING, deadline_s=began_s + 0.1)
        owner.decoder.finish([stream])
        assert stream.finish is Finish.DEADLINE
        assert time.monotonic() - began_s < 3


def test_calls_that_were_given_up_do_not_spoil_later_ones(tmp_path: Path) -> None:
    with world(tmp_path, **_NO_GUESSES) as owner:
        link = owner.client.trunk._link
        link._reconnect_s = 0.0
        first = owner.ask(REPEATING, 20)
        for _ in range(4):
            owner.decoder.step()
        owner.fault = lambda header: TransportError("the link broke")
        with pytest.raises(TransportError):
            owner.decoder.step()
        owner.decoder.fail(TransportError("the link broke"))
        owner.fault = lambda header: None
        other = [*REPEATING, *first.tokens[:3], 1]
        second = owner.ask(other)
        owner.decoder.step()
        # From here on the connection is lost once more, and all open calls are repeated.
        link._reconnect_s = 60.0
        owner.fail_once(TransportError("the link broke again"))
        owner.decoder.finish([second])
        assert second.num_cached == len(other) - 1
        assert second.tokens == owner.right(other)


def test_a_caller_that_fails_at_the_end_does_not_end_the_thread(tmp_path: Path) -> None:
    with world(tmp_path, **_NO_GUESSES) as owner:
        engine, done = owner.client.engine(), threading.Event()

        def broken(stream: Stream, error: CutlayerError | None) -> None:
            raise ValueError("a fault of the caller")

        request = Request(prompt=[4, 5], sampling=SamplingSettings(max_new_tokens=3))
        try:
            engine.submit(request, broken)
            engine.submit(request, lambda stream, error: done.set())
            assert done.wait(30)
            done.clear()
            engine.submit(request, lambda stream, error: done.set())
            assert done.wait(30)
        finally:
            engine.close()
