from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cutlayer.client.client import Client
from cutlayer.client.recut_sensors import (
    LinkMeter,
    Machine,
    MeteredChannel,
    available_bytes,
    metered,
)
from cutlayer.errors import TransportError
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import CloseSession, Kind
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_settings, loopback, running_server, server_settings

FRAME = Frame(kind=Kind.CLOSE_SESSION, header=CloseSession(session_id="none"))


def _group(folder: Path, limit: str, used: str, stat: str = "anon 5\n") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(used + "\n")
    (folder / "memory.stat").write_text(stat)


def _own(tmp_path: Path, place: str) -> Path:
    own = tmp_path / "own"
    own.write_text(f"12:cpu:/elsewhere\n0::{place}\n")
    return own


def test_available_memory_is_what_the_tightest_control_group_leaves(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", _own(tmp_path, "/outer/inner")
    _group(groups / "outer", "1000", "400")
    _group(groups / "outer" / "inner", "max", "300")
    assert available_bytes(groups, own, lambda: 5000) == 600
    _group(groups / "outer" / "inner", "500", "300", "inactive_file 50\nactive_file 9\n")
    assert available_bytes(groups, own, lambda: 5000) == 250
    assert available_bytes(groups, own, lambda: 100) == 100
    _group(groups / "outer" / "inner", "500", "700")
    assert available_bytes(groups, own, lambda: 5000) == 0


@pytest.mark.parametrize(("limit", "used"), [("max", "3"), ("", ""), ("-5", "3"), ("5", "x")])
def test_a_group_without_a_limit_or_with_nonsense_limits_nothing(
    tmp_path: Path, limit: str, used: str
) -> None:
    groups = tmp_path / "groups"
    _group(groups, limit, used)
    assert available_bytes(groups, _own(tmp_path, "/"), lambda: 77) == 77
    assert available_bytes(groups, _own(tmp_path, "/../.."), lambda: 77) == 77
    assert available_bytes(tmp_path / "nowhere", tmp_path / "nobody", lambda: 77) == 77


def test_memory_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    def broken() -> int:
        raise PermissionError("/proc is hidden")

    assert available_bytes(tmp_path, tmp_path / "own", broken) is None


def test_this_machine_answers_about_itself() -> None:
    readings = Machine().read()
    assert readings.available_bytes is not None
    assert 0 < readings.available_bytes <= psutil.virtual_memory().total
    assert readings.link_mbit_s is None
    assert readings.rtt_ms is None


@dataclass
class _Battery:
    percent: float
    power_plugged: bool | None


@pytest.mark.parametrize(
    ("battery", "charge"),
    [
        (None, None),
        (_Battery(17.0, False), 17.0),
        (_Battery(17.0, None), 17.0),
        (_Battery(17.0, True), 100.0),
    ],
)
def test_a_battery_on_mains_power_counts_as_full(
    monkeypatch: pytest.MonkeyPatch, battery: _Battery | None, charge: float | None
) -> None:
    # Machines that run tests have no battery to unplug.
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert Machine().read().battery_percent == charge


def test_a_battery_that_cannot_be_read_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise FileNotFoundError("energy_now")

    monkeypatch.setattr(psutil, "sensors_battery", broken, raising=False)
    assert Machine().read().battery_percent is None
    monkeypatch.delattr(psutil, "sensors_battery")
    assert Machine().read().battery_percent is None


def test_rate_is_bytes_over_the_time_in_which_calls_were_under_way() -> None:
    meter = LinkMeter()
    for began_s in (0.0, 0.5, 10.0):
        meter.add(125_000, began_s, began_s + 1.0)
    assert meter.mbit_s is None
    assert meter.rtt_ms is None
    meter.add(125_000, 20.0, 20.5)
    # 4 Mbit in 1.5 s of two calls that overlap, 1 s and 0.5 s.
    assert meter.mbit_s == pytest.approx(4 / 3)
    assert meter.rtt_ms == pytest.approx(500)


def test_only_the_last_calls_count() -> None:
    meter = LinkMeter()
    for place in range(100):
        meter.add(1000, float(place), place + 0.001)
    for place in range(100, 164):
        meter.add(1000, float(place), place + 0.5)
    assert meter.rtt_ms == pytest.approx(500)


def test_calls_without_any_time_say_nothing_of_the_rate() -> None:
    meter = LinkMeter()
    for _ in range(5):
        meter.add(1000, 1.0, 0.5)
    assert meter.mbit_s is None
    assert meter.rtt_ms == 0


def test_the_meter_hears_of_a_real_runs_calls_and_changes_nothing(tmp_path: Path) -> None:
    model, meter = tiny_llama_folder(tmp_path), LinkMeter()
    settings = client_settings(model, tmp_path, train__steps=2)
    with running_server(server_settings(model, tmp_path)) as server:
        connect = metered(lambda place: loopback(server), meter)
        with Client(settings, connect=lambda: connect(None)) as client:
            client.train()
            assert client.trunk.bytes_sent > 0
            assert client.trunk.bytes_received > 0
    assert meter.mbit_s is not None
    assert meter.mbit_s > 0
    assert meter.rtt_ms is not None


def test_a_failed_call_says_nothing_of_the_link() -> None:
    class Broken:
        bytes_sent = bytes_received = 0
        is_open = True

        def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
            future: Future[Frame] = Future()
            future.set_exception(TransportError("the link broke"))
            return future

        def close(self) -> None:
            self.is_open = False

    inner, meter = Broken(), LinkMeter()
    channel: Channel = MeteredChannel(inner, meter)
    for _ in range(9):
        with pytest.raises(TransportError):
            channel.call(FRAME).result()
    assert meter.rtt_ms is None
    channel.close()
    assert not inner.is_open
