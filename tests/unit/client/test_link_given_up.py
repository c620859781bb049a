"""Calls that nobody waits for any more, and an end while the server is away."""

import threading
import time
from pathlib import Path

import pytest

from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import Finish, Request
from cutlayer.errors import TransportError
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings


def _nobody(place: str | None) -> None:
    raise TransportError("nobody is there")


def test_a_call_that_was_given_up_is_not_repeated(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        link = client.trunk._link
        session = client.session([16])
        session.step([_feed(0, [1, 2])])
        connect, link._connect, link._reconnect_s = link._connect, _nobody, 0.2
        assert link._channel is not None
        link._channel.close()
        with pytest.raises(TransportError):
            session.step([_feed(0, [3])])
        assert link._open_calls == []
        link._connect = connect
        session.step([_feed(0, [4])])


def _feed(row: int, tokens: list[int]):  # type: ignore[no-untyped-def]
    from cutlayer.client.session import Feed

    return Feed(row=row, tokens=tokens)


def test_an_engine_ends_soon_while_the_server_is_away(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        link = client.trunk._link
        engine, begun = client.engine(), threading.Event()
        connect = link._connect

        def watch(new: object) -> bool:
            begun.set()
            time.sleep(0.01)
            return False

        request = Request(prompt=[4, 5], sampling=SamplingSettings(max_new_tokens=100), watch=watch)
        stream = engine.submit(request)
        assert begun.wait(30)
        link._connect = _nobody  # type: ignore[assignment]
        assert link._channel is not None
        link._channel.close()
        time.sleep(0.3)
        began_s = time.monotonic()
        engine.close()
        assert time.monotonic() - began_s < 10
        assert stream.finish in (Finish.ERROR, Finish.CANCELLED)
        link._connect = connect
        assert len(client.generate_ids([[4, 5]], SamplingSettings(max_new_tokens=3))[0]) == 3
