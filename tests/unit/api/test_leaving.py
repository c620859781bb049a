"""Clients that go away, never read, or are there when the endpoint ends: others keep their speed,
and nothing more of their streams is made.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable

import openai
import pytest

from tests.unit.api.conftest import MODEL, Serve, World


def _wait(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def _send(world: World, **body: object) -> socket.socket:
    """A raw request whose answer nobody reads."""
    content = json.dumps({"model": MODEL, "prompt": "abc"} | body).encode()
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", world.api.port))
    raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return raw


def _takes(raw: socket.socket, line: bytes) -> bool:
    with contextlib.suppress(ConnectionError):
        raw.sendall(line)
        return True
    return False


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_closes_ends_its_stream(serve: Serve, is_stream: bool) -> None:
    world = serve(token_s=0.05)
    raw = _send(world, stream=is_stream, max_tokens=100, temperature=1.5, seed=1)
    _wait(lambda: world.engine.counts.num_tokens > 2)
    raw.close()
    _wait(lambda: world.engine.status().num_streams == 0)
    assert world.engine.counts.num_tokens < 50
    made = world.client().completions.create(model=MODEL, prompt="abc", max_tokens=2)
    assert made.choices


def test_closing_the_official_clients_stream_ends_it(serve: Serve) -> None:
    world = serve(token_s=0.05)
    stream = world.client().completions.create(
        model=MODEL, prompt="abc", max_tokens=100, n=2, stream=True
    )
    next(stream)
    stream.close()
    _wait(lambda: world.engine.status().num_streams == 0)
    assert world.engine.counts.num_tokens < 60


def test_a_client_that_never_reads_is_cut_off_and_others_keep_their_speed(serve: Serve) -> None:
    world = serve(token_s=0.002, stall_s=0.5, max_queue=128)
    asked = {"stream": True, "n": 40, "max_tokens": 120, "logprobs": 20, "temperature": 1.9}
    deaf = _send(world, **asked)
    _wait(lambda: world.engine.counts.num_tokens > 40)
    made = world.client().completions.create(model=MODEL, prompt="abc", max_tokens=3)
    assert made.choices
    _wait(lambda: world.engine.status().num_streams == 0, 30)
    # It was ended by the stall, not by its length: 40 replies of 120 tokens never came.
    assert world.engine.counts.num_tokens < 40 * 120
    assert b"[DONE]" not in _rest(deaf)


def _rest(raw: socket.socket) -> bytes:
    """What was sent before the connection was cut."""
    found = b""
    raw.settimeout(10)
    with raw, contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(65536):
            found += piece
    return found


def test_hundreds_of_broken_requests_leave_nothing(serve: Serve) -> None:
    world = serve()

    def hurt(number: int) -> None:
        raw = (
            _send(world, stream=True, max_tokens=50)
            if number % 2
            else socket.create_connection(("127.0.0.1", world.api.port))
        )
        if number % 3 == 0:
            raw.sendall(b"\x16\x03\x01 nothing of HTTP\r\n\r\n")
        raw.close()

    before = threading.active_count()
    for number in range(300):
        hurt(number)
    _wait(lambda: world.engine.status().num_streams == 0, 30)
    assert world.client(retries=4).models.list().data
    assert threading.active_count() <= before + 40


@pytest.mark.parametrize("sent", [b"", b"GET /v1/models HTTP/1.1\r\n"])
def test_a_connection_without_a_request_is_cut(serve: Serve, sent: bytes) -> None:
    world = serve(stall_s=0.5)
    with socket.create_connection(("127.0.0.1", world.api.port), timeout=10) as raw:
        raw.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(100) == b""


def test_header_lines_that_trickle_in_do_not_keep_a_connection(serve: Serve) -> None:
    world = serve(stall_s=0.5)
    whole = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", world.api.port), timeout=10) as raw:
        raw.sendall(whole)
        assert raw.recv(10_000).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /v1/models HTTP/1.1\r\n")
        _wait(lambda: not _takes(raw, b"x-a: b\r\n"))


def test_a_reply_longer_than_the_patience_for_requests_is_not_cut(serve: Serve) -> None:
    world = serve(token_s=0.05, stall_s=0.3)
    made = world.client().completions.create(
        model=MODEL, prompt="abc", max_tokens=20, temperature=0
    )
    assert made.usage is not None
    assert made.usage.completion_tokens == 20


def test_replies_under_way_finish_when_the_endpoint_ends(serve: Serve) -> None:
    world = serve(token_s=0.05, drain_s=10)
    ends: list[str | None] = []

    def ask() -> None:
        made = world.client().completions.create(
            model=MODEL, prompt="abc", max_tokens=12, temperature=0, stream=True
        )
        ends.append(list(made)[-1].choices[0].finish_reason)

    asking = threading.Thread(target=ask)
    asking.start()
    _wait(lambda: world.engine.counts.num_tokens > 2)
    world.api.stop()
    asking.join()
    assert ends == ["length"]
    with pytest.raises(openai.APIConnectionError):
        world.client().models.list()


def test_a_reply_that_outlasts_the_drain_is_ended(serve: Serve) -> None:
    world = serve(token_s=0.3, drain_s=0)
    raw = _send(world, max_tokens=100)
    _wait(lambda: world.engine.counts.num_tokens > 0)
    began_s = time.monotonic()
    world.api.stop()
    assert time.monotonic() - began_s < 5
    _wait(lambda: world.engine.status().num_streams == 0)
    raw.close()
