"""The thread of generation: many callers, cancellation, deadlines, errors, an end."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cutlayer import Client
from cutlayer.client.engine import Engine
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import Finish, NewToken, Request, Stream
from cutlayer.errors import ConfigError, CutlayerError, TransportError
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

_WAIT_S = 60.0


class Ended:
    """Waits for the end of one stream."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.error: CutlayerError | None = None
        self.num_calls = 0

    def __call__(self, stream: Stream, error: CutlayerError | None) -> None:
        self.num_calls += 1
        self.error = error
        self._done.set()

    def wait(self) -> None:
        assert self._done.wait(_WAIT_S)


@contextmanager
def engine_world(tmp_path: Path, **changes: object) -> Iterator[tuple[Client, Engine]]:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path, **changes)) as client,
    ):
        engine = client.engine()
        try:
            yield client, engine
        finally:
            engine.close()


def request(prompt: list[int], num_new: int = 8, **options: object) -> Request:
    sampling = SamplingSettings(max_new_tokens=num_new)
    return Request(prompt=prompt, sampling=sampling, **options)  # type: ignore[arg-type]


def _slowly(new: NewToken) -> bool:
    """A caller that takes its time, so that a stream is still under way when it is to end."""
    time.sleep(0.01)
    return False


def test_callers_on_many_threads_get_what_each_would_get_alone(tmp_path: Path) -> None:
    prompts = [[number + 3, 7, number, 9] * 3 for number in range(12)]
    with engine_world(tmp_path, generation__max_streams=5) as (_, engine):
        found: dict[int, list[int]] = {}

        def ask(number: int) -> None:
            ended = Ended()
            stream = engine.submit(request(prompts[number], 5 + number), ended)
            ended.wait()
            found[number] = stream.tokens

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_WAIT_S)
        assert engine.status().num_tokens == sum(5 + number for number in range(12))
        assert engine.status().num_streams == engine.status().num_waiting == 0
    with engine_world(tmp_path) as (client, engine):
        engine.close()
        for number, prompt in enumerate(prompts):
            sampling = SamplingSettings(max_new_tokens=5 + number)
            assert client.generate_ids([prompt], sampling)[0] == found[number]


def test_a_cancelled_stream_ends_and_its_neighbour_goes_on(tmp_path: Path) -> None:
    with engine_world(tmp_path) as (_, engine):
        first, second, begun = Ended(), Ended(), threading.Event()

        def watch(new: NewToken) -> bool:
            begun.set()
            return _slowly(new)

        cancelled = engine.submit(request([4, 5], 120, watch=watch), first)
        other = engine.submit(request([90, 91], 30), second)
        assert begun.wait(_WAIT_S)
        engine.cancel(cancelled)
        first.wait()
        second.wait()
        engine.cancel(cancelled)
    assert cancelled.finish is Finish.CANCELLED
    assert 0 < len(cancelled.tokens) < 120
    assert other.finish is Finish.LENGTH
    assert first.num_calls == 1


def test_a_deadline_ends_a_stream_with_what_it_has(tmp_path: Path) -> None:
    with engine_world(tmp_path) as (_, engine):
        ended = Ended()
        stream = engine.submit(
            request([4, 5], 120, watch=_slowly, deadline_s=time.monotonic() + 0.2), ended
        )
        ended.wait()
    assert stream.finish is Finish.DEADLINE
    assert len(stream.tokens) < 120
    assert ended.error is None


@pytest.mark.parametrize("prompt", [[], [1] * 600])
def test_what_cannot_fit_is_refused_at_once(tmp_path: Path, prompt: list[int]) -> None:
    with (
        engine_world(tmp_path) as (_, engine),
        pytest.raises(ConfigError, match="in a context of"),
    ):
        engine.submit(request(prompt))


def test_a_server_that_is_gone_fails_the_streams_and_a_later_one_works(tmp_path: Path) -> None:
    with engine_world(tmp_path) as (client, engine):
        link = client.trunk._link
        connect, link._reconnect_s = link._connect, 0.2

        def nobody(place: str | None) -> None:
            raise TransportError("nobody is there")

        link._connect = nobody  # type: ignore[assignment]
        ended = Ended()
        stream = engine.submit(request([4, 5]), ended)
        ended.wait()
        assert isinstance(ended.error, TransportError)
        assert stream.finish is Finish.ERROR
        link._connect = connect
        again = Ended()
        engine.submit(request([4, 5]), again)
        again.wait()
        assert again.error is None


def test_a_watcher_that_fails_does_not_end_the_thread(tmp_path: Path) -> None:
    def broken(new: NewToken) -> bool:
        raise ValueError("a fault of the caller")

    with engine_world(tmp_path) as (_, engine):
        failed, later = Ended(), Ended()
        engine.submit(request([4, 5], watch=broken), failed)
        failed.wait()
        assert isinstance(failed.error, CutlayerError)
        engine.submit(request([4, 5]), later)
        later.wait()
        assert later.error is None


def test_closing_ends_what_is_under_way_and_refuses_what_comes(tmp_path: Path) -> None:
    with engine_world(tmp_path) as (_, engine):
        ended = Ended()
        stream = engine.submit(request([4, 5], 120, watch=_slowly), ended)
        engine.close()
        ended.wait()
        assert stream.finish is Finish.CANCELLED
        with pytest.raises(TransportError, match="closed"):
            engine.submit(request([4, 5]))


def test_the_status_counts_what_left(tmp_path: Path) -> None:
    with engine_world(tmp_path, generation__speculation={"kind": "none"}) as (client, engine):
        ended = Ended()
        engine.submit(request([4, 5, 6], 8), ended)
        ended.wait()
        status = engine.status()
    assert status.num_vectors_released == 3 + 7
    assert status.num_round_trips == 8
    assert status.bytes_up > 10 * 32 * 4
    assert status.guarantee == client.guarantee
