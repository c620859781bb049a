"""A headless Chromium, driven over its DevTools pipe. It checks nothing.

The pipe needs no port and no library: messages are JSON, each ended by a zero byte.
"""

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

__all__ = ["Browser", "Table", "browsing"]

Table = dict[str, object]
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
    "--window-size=1180,1000",
)
_ANSWER_S = 60.0
_START = 'exec chromium "$@" 3<&"$TO_BROWSER" 4>&"$FROM_BROWSER"'


class Browser:
    """One tab."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to_browser = to_browser
        self._from_browser = from_browser
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.messages: list[str] = []
        """What the console and the page's policy complained of."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = str(attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> object:
        """The value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            allowUnsafeEvalBlockedByCSP=False,
        )
        assert "exceptionDetails" not in answer, answer
        return cast(Table, answer["result"]).get("value")

    def wait_for(self, script: str, timeout_s: float = 20.0) -> object:
        """The first true value of an expression; pages may come and go meanwhile."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            # An error is a page that went away in the middle, an exception one that is not there.
            answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
            result = cast(Table, answer.get("result", {}))
            value = cast(Table, result.get("result", {})).get("value")
            if value and "exceptionDetails" not in result:
                return value
            assert time.monotonic() < deadline_s, f"{script} stayed {value!r}: {self.messages}"
            time.sleep(0.05)

    def type_text(self, text: str) -> None:
        """Type into the focused field and press Enter."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            # The page may be on its way to the next one before the key is up.
            self._ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                text="\r",
                windowsVirtualKeyCode=13,
            )

    def be_dark(self, is_dark: bool) -> None:
        """What the person prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, is_whole: bool = True) -> None:
        """A PNG of the page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=is_whole)["data"]
        path.write_bytes(base64.b64decode(str(data)))

    def call(self, method: str, **params: object) -> Table:
        """One DevTools command and its result."""
        answer = self._ask(method, **params)
        assert "error" not in answer, (method, answer)
        return cast(Table, answer["result"])

    def _ask(self, method: str, **params: object) -> Table:
        """A command's answer, errors too; events in between are kept if they complain."""
        self._number += 1
        message: Table = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                return answer
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.messages.append(json.dumps(answer["params"]))

    def _receive(self) -> Table:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from_browser], [], [], _ANSWER_S)
            assert ready, f"the browser has not answered for {_ANSWER_S} s"
            data = os.read(self._from_browser, 1 << 16)
            assert data, "the browser is gone"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        return cast(Table, json.loads(line))


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile, ended at the end."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Above 9, so that the shell's 3 and 4 cannot hit them.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
    process = subprocess.Popen(
        ["bash", "-c", _START, "chromium", *_FLAGS, f"--user-data-dir={profile}"],
        env=os.environ | {"TO_BROWSER": str(high[0]), "FROM_BROWSER": str(high[1])},
        pass_fds=high,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (theirs_in, theirs_out, *high):
        os.close(fd)
    try:
        browser = Browser(ours_out, ours_in)
        yield browser
        browser.call("Browser.close")
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
