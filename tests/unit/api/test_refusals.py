"""What is refused, and that it is refused in the API's own words."""

import http.client
import json
import math
import socket
import time
from collections.abc import Callable

import openai
import pytest

from cutlayer.api.errors import error_of
from cutlayer.errors import (
    BudgetExceeded,
    CacheFull,
    ConfigError,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    SessionLost,
    TransportError,
)
from tests.unit.api.conftest import MODEL, Serve, World

HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Answer = tuple[int, dict[str, object], dict[str, str]]


def _post(world: World, path: str, body: object, headers: dict[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", world.api.port, timeout=30)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | (headers or {})
    connection.request("POST", path, content, sent)
    response = connection.getresponse()
    table = json.loads(response.read())
    connection.close()
    return response.status, table["error"], {k.lower(): v for k, v in response.getheaders()}


def _chat(**changes: object) -> dict[str, object]:
    return {"model": MODEL, "messages": HELLO} | changes


def _completion(**changes: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": "abc"} | changes


@pytest.mark.parametrize(
    "content", [b"", b"{", b"nothing", b"[1]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 9999]
)
def test_a_body_that_is_no_json_object(world: World, content: bytes) -> None:
    status, error, _ = _post(world, CHAT, content)
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**6}, "n", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stop": ""}, "stop[0]", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_value"),
        ({"stop": "x" * 513}, "stop[0]", "invalid_value"),
        ({"repetition_penalty": 1e-308}, "repetition_penalty", "invalid_value"),
        ({"repetition_penalty": 1e308}, "repetition_penalty", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"frequency_penalty": 1}, "frequency_penalty", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"max_token": 5}, "max_token", "unknown_parameter"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(
    world: World, changes: dict[str, object], param: str, code: str | None
) -> None:
    status, error, _ = _post(world, CHAT, _chat(**changes))
    assert (status, error["param"], error["code"]) == (400, param, code), error
    assert world.engine.counts.num_tokens == 0


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], None, 5, {"a": 1}, [1, "a"], [True], [-1], [10**9], [[1], [2, "x"]], ["a", ""]],
)
def test_a_prompt_that_is_none_is_refused(world: World, prompt: object) -> None:
    status, error, _ = _post(world, COMPLETIONS, _completion(prompt=prompt))
    assert (status, error["param"]) == (400, "prompt")


@pytest.mark.parametrize("field", ["suffix", "best_of"])
def test_what_completions_do_not_do_is_said(world: World, field: str) -> None:
    value = {"suffix": "end", "best_of": 3}[field]
    _, error, _ = _post(world, COMPLETIONS, _completion(**{field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_echo_with_log_probabilities_is_refused(world: World) -> None:
    _, error, _ = _post(world, COMPLETIONS, _completion(echo=True, logprobs=1))
    assert error["param"] == "echo"


def test_fields_that_ask_for_nothing_are_accepted(world: World) -> None:
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "logit_bias": None,
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "seed": 2**80,
        "top_p": 0,
        "stop": None,
        "logprobs": False,
    }
    made = world.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=2, extra_body=harmless
    )
    assert made.usage is not None


def test_a_misspelt_field_gets_the_nearest_name(world: World) -> None:
    _, error, _ = _post(world, CHAT, _chat(max_token=5))
    assert "Did you mean 'max_tokens'?" in str(error["message"])


def test_texts_that_are_no_unicode_do_no_harm(world: World) -> None:
    status, _, _ = _post(
        world,
        CHAT,
        b'{"model": "' + MODEL.encode() + b'", "messages": '
        b'[{"role": "user", "content": "\\ud800"}]}',
    )
    assert status == 400


def test_a_prompt_longer_than_the_context(world: World) -> None:
    for given in ({"prompt": "a" * 200}, {"prompt": "a" * 20, "max_tokens": 120}):
        with pytest.raises(openai.BadRequestError) as caught:
            world.client().completions.create(model=MODEL, **given)
        assert caught.value.code == "context_length_exceeded"
        assert "maximum context length is 128 tokens" in str(caught.value)
    made = world.client().completions.create(model=MODEL, prompt="a" * 120, temperature=0)
    assert made.usage is not None
    assert made.usage.completion_tokens <= 8


def test_another_model_another_path_and_another_method(world: World) -> None:
    client = world.client()
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model=MODEL, input="x")
    assert "Unknown request URL: POST /v1/embeddings" in str(caught.value)
    connection = http.client.HTTPConnection("127.0.0.1", world.api.port)
    connection.request("GET", CHAT)
    assert connection.getresponse().status == 405
    connection.close()


def test_the_body_must_say_that_it_is_json(world: World) -> None:
    """A web page can send plain text across sites without asking; JSON it cannot."""
    status, _, _ = _post(world, CHAT, _chat(), {"Content-Type": "text/plain"})
    assert status == 415


def test_a_huge_body_is_refused_before_it_is_whole(serve: Serve) -> None:
    world = serve(max_body_bytes=2000)
    status, error, _ = _post(world, CHAT, _chat(user="x" * 5000))
    assert (status, error["type"]) == (413, "invalid_request_error")


def test_a_body_that_does_not_come_is_not_awaited_for_ever(serve: Serve) -> None:
    world = serve(stall_s=0.3)
    with socket.create_connection(("127.0.0.1", world.api.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("failure", "status", "code", "kind"),
    [
        (BudgetExceeded("spent"), 403, "privacy_budget_exceeded", openai.PermissionDeniedError),
        (CacheFull("no room"), 429, "rate_limit_exceeded", openai.RateLimitError),
        (TransportError("gone"), 503, "trunk_unavailable", openai.InternalServerError),
        (SessionLost("lost"), 503, "trunk_unavailable", openai.InternalServerError),
        (PermissionRefused("revoked"), 503, "trunk_refused", openai.InternalServerError),
        (ConfigError("wrong"), 400, None, openai.BadRequestError),
        (ProtocolError("odd"), 500, "internal_error", openai.InternalServerError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_fails_behind_the_endpoint_has_a_status_of_its_own(
    world: World,
    failure: CutlayerError,
    status: int,
    code: str | None,
    kind: type[openai.APIStatusError],
    is_stream: bool,
) -> None:
    world.engine.fail = failure
    with pytest.raises(kind) as caught:
        world.client().completions.create(model=MODEL, prompt="abc", stream=is_stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert str(failure) in str(caught.value)
    retry = caught.value.response.headers.get("retry-after")
    assert (retry is not None) == (status in (429, 503))


@pytest.mark.parametrize(
    ("asked_s", "told"),
    [(math.inf, "1"), (math.nan, "1"), (-5.0, "1"), (1e300, "3600"), (2.5, "3")],
)
def test_a_servers_odd_time_to_wait_is_not_passed_on(asked_s: float, told: str) -> None:
    failure = CacheFull("no room")
    failure.retry_after_s = asked_s
    assert error_of(failure).response().headers["retry-after"] == told


def test_a_million_wrong_messages_are_one_error(world: World) -> None:
    content = json.dumps(_chat(messages=[1] * 1_000_000)).encode()
    began_s = time.monotonic()
    status, error, _ = _post(world, CHAT, content)
    assert (status, error["param"]) == (400, "messages[0]")
    assert time.monotonic() - began_s < 3


def test_a_failure_in_the_middle_of_a_stream_is_an_event(world: World) -> None:
    world.engine.fail, world.engine.fail_after = TransportError("the trunk went away"), 3
    stream = world.client().completions.create(
        model=MODEL, prompt="abc", stream=True, temperature=0
    )
    assert next(stream).choices
    with pytest.raises(openai.APIError, match="the trunk went away"):
        list(stream)


def test_a_full_endpoint_says_when_to_come_back(serve: Serve) -> None:
    world = serve(token_s=0.2, max_queue=2)
    client = world.client()
    streams = [
        client.completions.create(model=MODEL, prompt="abc", max_tokens=10, stream=True)
        for _ in range(2)
    ]
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=MODEL, prompt="abc")
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "rate_limit_exceeded"
    world.engine.token_s = 0.0
    for stream in streams:
        stream.close()
    made = world.client(retries=4).completions.create(model=MODEL, prompt="abc", max_tokens=2)
    assert made.choices[0].finish_reason
    with pytest.raises(openai.BadRequestError, match=r"api\.max_queue"):
        client.completions.create(model=MODEL, prompt="abc", n=3)


def test_a_request_past_its_deadline(serve: Serve) -> None:
    world = serve(token_s=0.1, deadline_s=0.15)
    with pytest.raises(openai.InternalServerError) as caught:
        world.client(retries=2).completions.create(model=MODEL, prompt="abc")
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


@pytest.mark.parametrize(
    "make",
    [lambda: b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", lambda: b"{" + b'"a":1,' * 9999],
)
def test_deep_and_broken_json_is_an_answer_and_no_crash(
    world: World, make: Callable[[], bytes]
) -> None:
    assert _post(world, CHAT, make())[0] == 400
    assert world.client().models.list().data
