"""Which path answers what, to whom, with which headers."""

from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
from fastapi.testclient import TestClient

from cutlayer.dashboard.app import create_app
from cutlayer.dashboard.view import PageState
from cutlayer.web.auth import Gate
from tests.unit.dashboard.stand_in import StandInView

TOKEN = "t" * 40
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CLOSED = ("/metrics", "/api/state")


@pytest.fixture
def view() -> StandInView:
    return StandInView()


@pytest.fixture
def page(view: StandInView) -> Iterator[TestClient]:
    gate = Gate(TOKEN, login_s=100.0, now_s=lambda: 1000.0)
    with TestClient(create_app(view, gate, is_encrypted=False), follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Cookie": f"token={TOKEN}"},
        {"X-Token": TOKEN},
    ],
)
def test_there_is_no_content_without_the_token(
    page: TestClient, path: str, headers: dict[str, str]
) -> None:
    answer = page.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert "movies" not in answer.text
    assert "rounds_total" not in answer.text


@pytest.mark.parametrize("path", CLOSED)
def test_a_token_in_the_address_is_not_looked_at(page: TestClient, path: str) -> None:
    assert page.get(f"{path}?token={TOKEN}&access_token={TOKEN}").status_code == 401


def test_the_token_opens_state_and_metrics(page: TestClient, view: StandInView) -> None:
    state = page.get("/api/state", headers=BEARER)
    assert msgspec.json.decode(state.content, type=PageState).server == view.state
    assert page.get("/metrics", headers=BEARER).content == view.metrics()


def test_a_value_that_is_not_finite_is_still_json(page: TestClient, view: StandInView) -> None:
    federation = view.state.federation
    assert federation is not None
    worthless = replace(federation.published[0], value=float("nan"))
    view.state = replace(view.state, federation=replace(federation, published=(worthless,)))
    state = msgspec.json.decode(page.get("/api/state", headers=BEARER).content, type=PageState)
    assert state.server.federation is not None
    assert state.server.federation.published == (replace(worthless, value=None),)


def test_a_store_that_cannot_be_read_is_said_and_not_shown_as_a_crash(
    page: TestClient, view: StandInView
) -> None:
    view.is_broken = True
    answer = page.get("/api/state", headers=BEARER)
    assert (answer.status_code, answer.text) == (503, "cannot read the store: no space left\n")


def test_health_needs_no_token(page: TestClient, view: StandInView) -> None:
    assert page.get("/healthz").text == "ok\n"
    assert page.get("/readyz").status_code == 200
    view.ready = False
    assert page.get("/readyz").status_code == 503
    assert page.get("/healthz").status_code == 200


def test_the_form_exchanges_the_token_for_a_cookie(page: TestClient) -> None:
    before = page.get("/")
    assert (before.status_code, "<form" in before.text) == (401, True)
    entered = page.post("/login", data={"token": f" {TOKEN} "})
    assert (entered.status_code, entered.headers["Location"]) == (303, "./")
    cookie = entered.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert TOKEN not in cookie
    assert 'id="members"' in page.get("/").text
    assert page.get("/api/state").status_code == 200
    assert page.post("/logout").status_code == 303
    assert page.get("/api/state").status_code == 401


def test_a_cookie_insists_on_https_where_there_is_https() -> None:
    gate = Gate(TOKEN, login_s=100.0, now_s=lambda: 1000.0)
    with TestClient(create_app(StandInView(), gate, is_encrypted=True)) as page:
        answer = page.post("/login", data={"token": TOKEN}, follow_redirects=False)
    assert "Secure" in answer.headers["Set-Cookie"]


@pytest.mark.parametrize(
    "body",
    [b"", b"token=", b"token=wrong", b"tok=1", b"\xff\x00", b"a=1&" * 900, b"token=" + b"t" * 9999],
)
def test_a_wrong_form_gets_the_form_again_and_no_cookie(page: TestClient, body: bytes) -> None:
    answer = page.post("/login", content=body)
    assert answer.status_code == 401
    assert 'role="alert">' in answer.text
    assert "Set-Cookie" not in answer.headers


def test_a_wrong_header_is_not_saved_by_a_right_cookie(page: TestClient) -> None:
    page.post("/login", data={"token": TOKEN})
    assert page.get("/api/state", headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/api/state", "/static/page.js", "/nothing", "/static/nothing"]
)
def test_every_answer_forbids_markup_from_texts_frames_and_caches(
    page: TestClient, path: str
) -> None:
    headers = page.get(path, headers=BEARER).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    ["/docs", "/openapi.json", "/redoc", "/static/", "/static/..%2fapp.py", "/static/app.py"],
)
def test_nothing_else_is_served(page: TestClient, path: str) -> None:
    assert page.get(path, headers=BEARER).status_code == 404


def test_the_page_names_nothing_beyond_this_server(page: TestClient) -> None:
    page.post("/login", data={"token": TOKEN})
    names = ("page.js", "charts.js", "format.js", "style.css")
    texts = [page.get(f"/static/{name}").text for name in names] + [page.get("/").text]
    for text in texts:
        outside = text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in outside
        assert "https://" not in outside
        assert "innerHTML" not in outside
        assert " style=" not in outside
