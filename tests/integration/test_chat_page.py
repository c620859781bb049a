"""The chat page in a real browser: a streamed reply, what it costs, its form and its policy."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cutlayer.api.engine import ServedModel
from cutlayer.api.serve import Api, start_api
from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import BudgetExceeded
from cutlayer.settings import parse_settings
from cutlayer.web.auth import read_token
from cutlayer.web.settings import ApiSettings
from tests.integration.browser import Browser, browsing
from tests.tiny_models import tiny_model
from tests.unit.api.plain_engine import PlainEngine

pytestmark = pytest.mark.system

READY = "document.querySelectorAll('#numbers dd').length === 8"
DONE = "[...document.querySelectorAll('#turns small')].filter(s => s.textContent).length === {}"
FORM = "document.activeElement?.id === 'token'"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.open("about:blank")
    chromium.call("Network.clearBrowserCookies")
    chromium.messages.clear()
    return chromium


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[PlainEngine]:
    made = PlainEngine(tiny_model("llama", folder)[1], token_s=0.01)
    yield made
    made.close()


def _start(engine: PlainEngine, folder: Path, run: Path, **changes: object) -> Api:
    settings = parse_settings(ApiSettings, {"address": "127.0.0.1:0"} | changes, "test")
    model = ServedModel(
        name="tiny",
        tokenizer=AutoTokenizer.from_pretrained(folder / "tiny-llama"),
        context_length=128,
        sampling=SamplingSettings(max_new_tokens=24),
    )
    engine.fail = None
    return start_api(engine, model, settings, run)


@pytest.fixture
def api(engine: PlainEngine, folder: Path, tmp_path: Path) -> Iterator[Api]:
    served = _start(engine, folder, tmp_path)
    yield served
    served.stop()


def _say(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('text').focus()")
    browser.type_text(text)


def _text(browser: Browser, element: str) -> str:
    return str(browser.run(f"document.getElementById('{element}').innerText"))


def test_a_reply_is_streamed_and_what_it_cost_is_shown(browser: Browser, api: Api) -> None:
    browser.open(f"{api.url}/")
    browser.wait_for(READY)
    assert _text(browser, "model") == "tiny"
    assert _text(browser, "guarantee") == "no noise: none"
    _say(browser, "hi")
    browser.wait_for("document.querySelector('#turns li.assistant p')?.textContent.length > 0")
    browser.wait_for(DONE.format(1))
    assert browser.run("document.querySelector('#turns li.user p').textContent") == "hi"
    note = str(browser.run("document.querySelector('#turns li.assistant small').textContent"))
    assert "tokens" in note
    assert "per second" in note
    names = browser.run("[...document.querySelectorAll('#numbers dt')].map(d => d.textContent)")
    wanted = ["tokens per second", "round trips saved", "bytes sent", "vectors released"]
    assert isinstance(names, list)
    assert set(wanted) < set(names)
    _say(browser, "and?")
    browser.wait_for(DONE.format(2))
    assert browser.run("document.querySelectorAll('#turns li').length") == 4
    browser.run("document.getElementById('fresh').click()")
    assert browser.run("document.querySelectorAll('#turns li').length") == 0


def test_a_reply_can_be_stopped_and_the_stream_behind_it_ends(
    browser: Browser, api: Api, engine: PlainEngine
) -> None:
    browser.open(f"{api.url}/")
    browser.wait_for(READY)
    engine.token_s, before = 0.2, engine.counts.num_tokens
    try:
        _say(browser, "tell me more")
        browser.wait_for("!document.getElementById('stop').hidden")
        browser.wait_for("document.querySelector('#turns li.assistant p')?.textContent.length > 0")
        browser.run("document.getElementById('stop').click()")
        browser.wait_for(DONE.format(1))
        browser.wait_for("!document.getElementById('send').disabled")
        deadline_s = time.monotonic() + 10
        while engine.status().num_streams and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert engine.status().num_streams == 0
        assert engine.counts.num_tokens - before < 24
    finally:
        engine.token_s = 0.01


def test_what_goes_wrong_is_told(browser: Browser, api: Api, engine: PlainEngine) -> None:
    browser.open(f"{api.url}/")
    browser.wait_for(READY)
    engine.fail = BudgetExceeded("the day's budget of 100 vectors is spent")
    _say(browser, "hi")
    browser.wait_for("!document.getElementById('problem').hidden")
    assert "budget of 100 vectors is spent" in _text(browser, "problem")
    engine.fail = None


def test_markup_in_a_reply_stays_text(browser: Browser, api: Api) -> None:
    browser.open(f"{api.url}/")
    browser.wait_for(READY)
    _say(browser, "<img src=x onerror=document.title=1><script>1</script>")
    browser.wait_for(DONE.format(1))
    assert browser.run("document.querySelectorAll('#turns img, #turns script').length") == 0
    assert "<script>" in str(browser.run("document.querySelector('#turns li p').textContent"))
    attempt = "document.body.innerHTML = 'x'"
    attempt = f"(() => {{ try {{ {attempt}; return 'taken' }} catch (e) {{ return e.name }} }})()"
    assert browser.run(attempt) == "TypeError"


def test_nothing_comes_from_elsewhere_and_nothing_is_complained_of(
    browser: Browser, api: Api
) -> None:
    browser.open(f"{api.url}/")
    browser.wait_for(READY)
    _say(browser, "hi")
    browser.wait_for(DONE.format(1))
    assert browser.run(
        "performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))"
    )
    assert [text for text in browser.messages if '"verbose"' not in text] == []
    for is_dark in (True, False):
        browser.be_dark(is_dark)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_a_token_opens_the_page_and_signing_out_closes_it(
    browser: Browser, engine: PlainEngine, folder: Path, tmp_path: Path
) -> None:
    token_file = tmp_path / "api.token"
    served = _start(engine, folder, tmp_path, token_file=str(token_file))
    try:
        browser.open(f"{served.url}/")
        browser.wait_for(FORM)
        browser.type_text("wrong")
        browser.wait_for("document.querySelector('[role=alert]')?.checkVisibility()")
        browser.wait_for(FORM)
        browser.type_text(read_token(token_file))
        browser.wait_for(READY)
        assert browser.run("document.cookie") == ""
        _say(browser, "hi")
        browser.wait_for(DONE.format(1))
        assert "per second" in str(browser.run("document.querySelector('#turns').innerText"))
        browser.run("document.querySelector('#logout button').click()")
        browser.wait_for(FORM)
    finally:
        served.stop()
