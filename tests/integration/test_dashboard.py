"""The server's page in a real browser: its form, its rows, its policy."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer.dashboard.serve import Dashboard, start_dashboard
from cutlayer.dashboard.server_view import OneServerView
from cutlayer.dashboard.view import MemberStatus
from cutlayer.web.auth import read_token
from cutlayer.web.settings import HttpSettings
from tests.integration.browser import Browser, browsing
from tests.unit.dashboard.server_world import StandInFederation, StandInServer
from tests.unit.dashboard.stand_in import HOSTILE, StandInView, snapshot, without_federation
from tests.unit.dashboard.store_world import finish_round, new_store

pytestmark = pytest.mark.system

FORM = "document.activeElement?.id === 'token' && document.getElementById('login') !== null"
ROWS = "[...document.querySelectorAll('#{} tbody tr')].map(r => [...r.cells].map(c => c.innerText))"


@pytest.fixture
def view() -> StandInView:
    return StandInView()


@pytest.fixture
def dashboard(view: StandInView, tmp_path: Path) -> Iterator[Dashboard]:
    served = start_dashboard(view, HttpSettings(address="127.0.0.1:0"), tmp_path)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The one browser, signed out everywhere."""
    chromium.open("about:blank")
    chromium.call("Network.clearBrowserCookies")
    chromium.messages.clear()
    return chromium


def _sign_in(browser: Browser, dashboard: Dashboard) -> None:
    browser.open(f"{dashboard.url}/")
    browser.wait_for(FORM)
    browser.type_text(read_token(dashboard.token_file))
    browser.wait_for("document.querySelectorAll('#numbers dd').length === 6")


def _rows(browser: Browser, table: str) -> list[list[str]]:
    rows = browser.run(ROWS.format(table))
    assert isinstance(rows, list)
    return rows


def _text(browser: Browser, element: str) -> object:
    return browser.run(f"document.getElementById('{element}').innerText")


def test_the_token_opens_the_page_and_the_rows_are_there(
    browser: Browser, dashboard: Dashboard
) -> None:
    _sign_in(browser, dashboard)
    assert [row[:4] for row in _rows(browser, "members")] == [
        ["amazon", "training", "6", "0"],
        ["movies", "waiting", "5", "1"],
        ["nyt", "left", "4", "2"],
        ["tweets", "straggler", "3", "3"],
    ]
    rounds = _rows(browser, "rounds")
    assert [row[0] for row in rounds] == ["6", "5", "4", "3", "2", "1"]
    assert rounds[3][1:7] == ["1 min 18 s", "3 of 4", "2", "48,264", "3.4 MB", "2.9 MB"]
    assert rounds[3][8] == "tweets"
    assert len(_rows(browser, "runs")) == 4
    assert [row[1] for row in _rows(browser, "replicas")] == ["alive", "restarting"]
    assert (
        _text(browser, "phase") == "Round 7 of 20, attempt 2: members train and send their updates"
    )
    assert _text(browser, "waits") == "Waiting for amazon"
    assert "secure aggregation on" in str(_text(browser, "rules"))


def test_losses_are_those_that_members_published_and_say_so(
    browser: Browser, dashboard: Dashboard
) -> None:
    _sign_in(browser, dashboard)
    assert {row[0] for row in _rows(browser, "published")} == {"amazon", "nyt"}
    assert "published by members" in str(_text(browser, "loss-figure"))
    assert browser.run("document.querySelectorAll('#loss polyline').length") == 2
    assert browser.run("document.querySelectorAll('#seconds rect').length") == 6
    label = browser.run("document.getElementById('loss').getAttribute('aria-label')")
    assert label == "Loss by round as published by amazon, nyt"


def test_where_nobody_publishes_there_is_no_loss(
    browser: Browser, dashboard: Dashboard, view: StandInView
) -> None:
    assert view.state.federation is not None
    view.state = replace(view.state, federation=replace(view.state.federation, published=()))
    _sign_in(browser, dashboard)
    assert "loss" not in str(browser.run("document.body.innerText")).lower()


def test_a_wrong_token_shows_the_form_again_and_nothing_else(
    browser: Browser, dashboard: Dashboard
) -> None:
    browser.open(f"{dashboard.url}/")
    browser.wait_for(FORM)
    browser.type_text("not the token")
    browser.wait_for("document.querySelector('[role=alert]')?.checkVisibility()")
    text = str(browser.run("document.body.innerText"))
    assert "That is not this server" in text
    assert "amazon" not in text
    browser.wait_for(FORM)


def test_a_script_of_the_page_cannot_read_the_cookie_and_signing_out_ends_it(
    browser: Browser, dashboard: Dashboard
) -> None:
    _sign_in(browser, dashboard)
    assert browser.run("document.cookie") == ""
    browser.run("document.querySelector('header button').click()")
    browser.wait_for(FORM)
    browser.open(f"{dashboard.url}/")
    browser.wait_for(FORM)


def test_a_hostile_name_is_shown_as_text(
    browser: Browser, dashboard: Dashboard, view: StandInView
) -> None:
    view.state = snapshot(hostile=True)
    _sign_in(browser, dashboard)
    shown = browser.run("document.querySelector('#members td').textContent")
    assert shown == HOSTILE
    assert browser.run("document.querySelectorAll('td img, td script, li img, p img').length") == 0
    assert browser.run("document.title") == "reviews · cutlayer"
    for where in ("waits", "legend", "published", "runs", "replicas"):
        assert "<script>" in str(browser.run(f"document.getElementById('{where}').textContent")), (
            where
        )


def test_markup_from_texts_is_forbidden_by_the_browser_itself(
    browser: Browser, dashboard: Dashboard
) -> None:
    _sign_in(browser, dashboard)
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.setAttribute('onclick', 'document.title=1')",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'x'}))",
        "new Function('document.title=1')()",
    ):
        script = (
            f"(() => {{ try {{ {attempt}; return 'taken' }} catch (e) {{ return e.name }} }})()"
        )
        assert browser.run(script) in ("TypeError", "EvalError"), attempt
    assert browser.run("document.title") == "reviews · cutlayer"


def test_the_page_follows_the_server_without_a_reload(
    browser: Browser, dashboard: Dashboard, view: StandInView
) -> None:
    _sign_in(browser, dashboard)
    browser.run("window.mark = document.querySelector('#members tbody tr')")
    federation = snapshot(num_rounds=7).federation
    assert federation is not None
    members = federation.members
    federation = replace(
        federation, members=(replace(members[0], status=MemberStatus.AWAY), *members[1:])
    )
    view.state = replace(view.state, federation=federation)
    browser.wait_for("document.querySelectorAll('#rounds tbody tr').length === 7")
    assert _rows(browser, "members")[0][1] == "away"
    assert browser.run("window.mark === document.querySelector('#members tbody tr')")
    view.state = replace(view.state, federation=None)
    browser.wait_for("document.getElementById('members-section').hidden")
    assert _text(browser, "title") == "Trunk server"


def test_trouble_is_told_and_passes(
    browser: Browser, dashboard: Dashboard, view: StandInView
) -> None:
    _sign_in(browser, dashboard)
    view.is_broken = True
    browser.wait_for("!document.getElementById('problem').hidden")
    assert "no space left" in str(_text(browser, "problem"))
    assert len(_rows(browser, "members")) == 4
    view.is_broken = False
    browser.wait_for("document.getElementById('problem').hidden")


def test_nothing_is_asked_of_another_host_and_nothing_is_complained_of(
    browser: Browser, dashboard: Dashboard, view: StandInView
) -> None:
    _sign_in(browser, dashboard)
    view.state = without_federation()
    browser.wait_for("document.getElementById('federation').hidden")
    assert browser.run(
        "performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))"
    )
    # The form comes with status 401, which the browser notes.
    complaints = [text for text in browser.messages if '"verbose"' not in text]
    assert [text for text in complaints if "401" not in text] == []


@pytest.mark.parametrize("num_rounds", [0, 1, 200])
def test_a_young_and_an_old_federation_fit_the_page(
    num_rounds: int, browser: Browser, dashboard: Dashboard, view: StandInView
) -> None:
    view.state = snapshot(num_rounds=num_rounds)
    _sign_in(browser, dashboard)
    assert len(_rows(browser, "rounds")) == num_rounds
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert "NaN" not in str(browser.run("document.body.outerHTML"))


def test_a_real_store_fills_the_page_while_rounds_are_written(
    browser: Browser, tmp_path: Path
) -> None:
    with new_store(tmp_path / "store", num_rounds=4) as store:
        view = OneServerView(StandInServer(), StandInFederation(store))
        served = start_dashboard(view, HttpSettings(address="127.0.0.1:0"), tmp_path)
        try:
            _sign_in(browser, served)
            assert _text(browser, "phase") == "Round 5 of 10: members train and send their updates"
            assert [row[:4] for row in _rows(browser, "members")] == [
                ["amazon", "waiting", "4", "0"],
                ["movies", "training", "4", "0"],
                ["nyt", "left", "4", "0"],
                ["tweets", "straggler", "2", "2"],
            ]
            finish_round(store, 5)
            browser.wait_for("document.querySelectorAll('#rounds tbody tr').length === 5")
            assert _rows(browser, "published")[0] == ["amazon", "loss", "5", "0.4"]
        finally:
            served.stop()
            view.close()
