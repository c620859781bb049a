"""Who may ask: the token, the name in the Host header, the site that sends."""

import http.client
import json
import stat
from pathlib import Path

import openai
import pytest

from cutlayer.api.serve import start_api
from cutlayer.errors import ConfigError, StorageError
from cutlayer.settings import parse_settings
from cutlayer.web.auth import read_token
from cutlayer.web.settings import ApiSettings
from tests.unit.api.conftest import MODEL, Serve, World

BODY = json.dumps({"model": MODEL, "prompt": "abc", "max_tokens": 2}).encode()
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def _ask(world: World, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", world.api.port, timeout=30)
    body = BODY if method == "POST" else None
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, response.read().decode()
    connection.close()
    return found


def test_on_loopback_no_token_is_needed_and_any_key_is_fine(world: World) -> None:
    assert world.api.token_file is None
    assert world.client("whatever").models.list().data


def test_with_a_token_file_nothing_answers_without_it(serve: Serve, keys: Path) -> None:
    path = keys / "api.token"
    world = serve(token_file=str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert world.client(read_token(path)).models.list().data
    for wrong in ("wrong", read_token(path)[:-1]):
        with pytest.raises(openai.AuthenticationError) as caught:
            world.client(wrong).completions.create(model=MODEL, prompt="abc")
        assert caught.value.code == "invalid_api_key"
        assert wrong not in str(caught.value)
    for route in ("/v1/models", "/v1/models/x", "/status", "/v1/nothing", "/metrics"):
        assert _ask(world, "GET", route, {})[0] == 401
        assert _ask(world, "GET", f"{route}?token={read_token(path)}", {})[0] == 401
    assert _ask(world, "GET", "/healthz", {}) == (200, "ok\n")
    status, page = _ask(world, "GET", "/", {})
    assert (status, 'id="login"' in page) == (401, True)
    assert world.engine.counts.num_tokens == 0


def test_a_cookie_of_the_page_opens_the_api_too(serve: Serve, keys: Path) -> None:
    path = keys / "api.token"
    world = serve(token_file=str(path))
    connection = http.client.HTTPConnection("127.0.0.1", world.api.port)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/login", f"token={read_token(path)}", form)
    cookie = str(connection.getresponse().getheader("Set-Cookie")).partition(";")[0]
    connection.close()
    assert _ask(world, "GET", "/status", {"Cookie": cookie})[0] == 200
    assert _ask(world, "POST", "/v1/completions", JSON | {"Cookie": cookie})[0] == 200
    sneaking = JSON | {"Cookie": cookie, "Origin": "http://127.0.0.1:3000"}
    assert _ask(world, "POST", "/v1/completions", sneaking)[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost@x", "[x"]
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(world: World, host: str) -> None:
    for route in ("/", "/status", "/v1/models"):
        status, text = _ask(world, "GET", route, {"Host": host})
        assert (status, "host_not_allowed" in text) == (403, True)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.8.8.8:9", "[::1]:7"])
def test_names_of_this_machine_are_answered(world: World, host: str) -> None:
    assert _ask(world, "GET", "/v1/models", {"Host": host})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"},
    ],
)
def test_a_web_page_of_another_origin_spends_nothing(world: World, headers: dict[str, str]) -> None:
    status, text = _ask(world, "POST", "/v1/completions", JSON | headers)
    assert (status, "origin_not_allowed" in text) == (403, True)
    assert world.engine.counts.num_tokens == 0
    assert _ask(world, "OPTIONS", "/v1/completions", headers)[0] == 405


def test_the_own_page_may_ask(world: World) -> None:
    own = {"Origin": world.api.url, "Sec-Fetch-Site": "same-origin"}
    assert _ask(world, "POST", "/v1/completions", JSON | own)[0] == 200
    assert _ask(world, "POST", "/v1/completions", JSON | {"Origin": world.api.url})[0] == 200


def test_no_answer_lets_another_origin_read(world: World) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", world.api.port)
    for method, route in (("GET", "/v1/models"), ("GET", "/"), ("GET", "/static/chat.js")):
        connection.request(method, route, headers={"Origin": "https://evil.example"})
        response = connection.getresponse()
        response.read()
        names = {name.lower() for name, _ in response.getheaders()}
        assert "access-control-allow-origin" not in names
        assert "default-src 'none'" in str(response.getheader("Content-Security-Policy"))
        assert response.getheader("Cache-Control") == "no-store"
    connection.close()


def test_beyond_loopback_there_is_always_a_token_and_https(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api\.address=0\.0\.0\.0:0 is beyond loopback"):
        parse_settings(ApiSettings, {"address": "0.0.0.0:0"}, "test")
    table = {"address": "0.0.0.0:0", "plaintext_behind_proxy": True}
    settings = parse_settings(ApiSettings, table, "test")
    assert settings.needs_token
    served = start_api(world.engine, world.model, settings, tmp_path / "run")
    try:
        assert served.token_file == tmp_path / "run" / "api.token"
        other = World(served, world.engine, world.model, world.plain)
        # A proxy in front has a name of its own.
        assert _ask(other, "GET", "/v1/models", {"Host": "llm.example.org"})[0] == 401
        bearer = {"Authorization": f"Bearer {read_token(served.token_file)}"}
        assert _ask(other, "GET", "/v1/models", bearer | {"Host": "llm.example.org"})[0] == 200
    finally:
        served.stop()


def test_a_token_that_others_may_read_keeps_the_endpoint_shut(world: World, tmp_path: Path) -> None:
    (tmp_path / "api.token").write_text("t" * 40)
    (tmp_path / "api.token").chmod(0o644)
    settings = parse_settings(
        ApiSettings,
        {"address": "127.0.0.1:0", "token_file": str(tmp_path / "api.token")},
        "test",
    )
    with pytest.raises(StorageError, match="chmod 600"):
        start_api(world.engine, world.model, settings, tmp_path)


def test_status_tells_counts_and_no_text(world: World) -> None:
    world.client().completions.create(model=MODEL, prompt="secret words", max_tokens=3)
    status, text = _ask(world, "GET", "/status", {})
    table = json.loads(text)
    assert status == 200
    assert table["model"] == MODEL
    assert table["guarantee"] == "no noise: none"
    assert table["num_tokens"] > 0
    assert table["num_replies"] == 0
    assert "secret" not in text
