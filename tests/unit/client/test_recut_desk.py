"""One request at a time, and an answer for each, whatever becomes of the trainer."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.client.recut import RecutReport
from cutlayer.client.recut_desk import Desk, ask, is_attended
from cutlayer.client.recut_watch import RecutWatch, RecutWish
from cutlayer.errors import ConfigError, SpecMismatch, StorageError, TransportError
from cutlayer.model.partition import Cut
from cutlayer.storage.files import private_folder, write_atomic

REPORT = RecutReport(
    run_id="x.c1",
    old=(1, 3),
    new=(2, 3),
    step=8,
    to_server=[],
    to_client=[1],
    bytes_up=10,
    bytes_down=20,
    seconds=0.5,
)


class _Policy:
    """Wants one cut, once, and keeps what it is told."""

    def __init__(self, cut: Cut | None = None) -> None:
        self.cut = cut
        self.told: list[object] = []

    def wanted(self, now_s: float) -> Cut | None:
        cut, self.cut = self.cut, None
        return cut

    def moved(self, cut: Cut, now_s: float) -> None:
        self.told.append(cut)

    def refused(self, why: str) -> None:
        self.told.append(why)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return private_folder(tmp_path / "run")


@pytest.fixture
def watch(folder: Path) -> Iterator[RecutWatch]:
    with RecutWatch(Desk(folder), _Policy()) as opened:
        yield opened


def _asked(folder: Path, found: list[object]) -> threading.Thread:
    """`cutlayer recut` in a thread; it has left its request when this returns."""

    def run() -> None:
        try:
            found.append(ask(folder, 2, None, True, timeout_s=20.0))
        except (ConfigError, TransportError) as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not (folder / "recut.request").exists() and thread.is_alive():
        thread.join(0.01)
    return thread


def test_a_request_is_answered_with_what_was_done(folder: Path, watch: RecutWatch) -> None:
    found: list[object] = []
    wishes: list[RecutWish] = []
    assert not watch.is_wanted()
    thread = _asked(folder, found)
    assert watch.is_wanted()

    def move(wish: RecutWish) -> RecutReport:
        wishes.append(wish)
        return REPORT

    assert watch.serve(move) == REPORT
    thread.join(20)
    assert (found, wishes) == ([REPORT], [RecutWish(lower=2, upper=None, shares=True)])
    assert [path.name for path in folder.iterdir()] == ["recut.ready"]
    assert not watch.is_wanted()


def test_a_refusal_reaches_the_command_as_the_error_it_is(folder: Path, watch: RecutWatch) -> None:
    found: list[object] = []
    thread = _asked(folder, found)

    def move(wish: RecutWish) -> RecutReport:
        raise SpecMismatch("blocks that this server does not have")

    assert watch.serve(move) is None
    thread.join(20)
    (error,) = found
    assert isinstance(error, SpecMismatch)
    assert "does not have" in str(error)


def test_the_second_of_two_requests_is_refused_and_the_first_goes_on(
    folder: Path, watch: RecutWatch
) -> None:
    found: list[object] = []
    thread = _asked(folder, found)
    with pytest.raises(ConfigError, match="another re-cut"):
        ask(folder, 1, None, False, timeout_s=1.0)
    watch.serve(lambda wish: REPORT)
    thread.join(20)
    assert found == [REPORT]


def test_a_training_that_ends_tells_whoever_waits(folder: Path) -> None:
    found: list[object] = []
    with RecutWatch(Desk(folder), _Policy()):
        thread = _asked(folder, found)
    thread.join(20)
    (error,) = found
    assert "ended before" in str(error)
    assert list(folder.iterdir()) == []
    assert not is_attended(folder)


def test_a_trainer_that_was_killed_is_not_waited_for(folder: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_atomic(folder / "recut.ready", b'{"pid": %d, "born_s": 1.0}' % dead.pid)
    assert not is_attended(folder)
    # Another process has its number now.
    write_atomic(folder / "recut.ready", b'{"pid": %d, "born_s": 1.0}' % os.getpid())
    assert not is_attended(folder)
    with pytest.raises(TransportError, match="ended before it answered"):
        ask(folder, 2, None, False, timeout_s=20.0)
    assert not (folder / "recut.request").exists()


def test_a_trainer_that_is_busy_too_long_is_not_asked_twice(folder: Path) -> None:
    with RecutWatch(Desk(folder), _Policy()) as watch:
        with pytest.raises(TransportError, match="has not answered yet"):
            ask(folder, 2, None, False, timeout_s=0.1)
        assert not watch.is_wanted()


def test_a_request_that_the_next_trainer_threw_away_is_not_waited_for(folder: Path) -> None:
    found: list[object] = []
    with RecutWatch(Desk(folder), _Policy()):
        thread = _asked(folder, found)
        Desk(folder)
        thread.join(20)
    (error,) = found
    assert isinstance(error, TransportError)


def test_rubbish_in_place_of_a_request_is_thrown_away(folder: Path, watch: RecutWatch) -> None:
    write_atomic(folder / "recut.request", b"now!")
    assert watch.is_wanted()
    assert watch.serve(lambda wish: REPORT) is None
    assert not watch.is_wanted()


def test_what_an_earlier_process_left_is_gone(folder: Path) -> None:
    for name in ("recut.request", "recut.answer.77", "recut.ready"):
        write_atomic(folder / name, b"{}")
    desk = Desk(folder)
    assert [path.name for path in folder.iterdir()] == ["recut.ready"]
    desk.close()


def test_an_answer_that_cannot_be_written_ends_no_training(
    folder: Path, watch: RecutWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []
    thread = _asked(folder, found)

    def full(path: Path, data: bytes) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr("cutlayer.client.recut_desk.write_atomic", full)
    assert watch.serve(lambda wish: REPORT) == REPORT
    thread.join(20)
    (error,) = found
    assert isinstance(error, TransportError)
    assert not watch.is_wanted()


def test_a_policy_is_served_and_told(folder: Path) -> None:
    policy = _Policy(Cut(2, 3))
    with RecutWatch(Desk(folder), policy) as watch:
        assert watch.is_wanted()
        assert watch.serve(lambda wish: REPORT) == REPORT
        policy.cut = Cut(0, 3)
        assert watch.is_wanted()

        def refuse(wish: RecutWish) -> RecutReport:
            assert (wish.lower, wish.upper, wish.shares) == (0, 3, False)
            raise ConfigError("no consent")

        assert watch.serve(refuse) is None
    assert policy.told == [Cut(2, 3), "no consent"]
