import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.client.recut_policy import RecutPolicy, shows_blocks
from cutlayer.client.recut_sensors import Readings
from cutlayer.client.recut_settings import RecutSettings
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from cutlayer.settings import parse_settings

HOME, SMALL, LARGE = Cut(2, 28), Cut(0, 30), Cut(5, 20)
GB = 10**9
MEMORY = {"below_gb": 2.0, "cut": [0, 30]}
BATTERY = {"below_percent": 30.0, "cut": [1, 29]}
LINK = {"below_mbit_s": 5.0, "above_rtt_ms": 200.0, "cut": [5, 20]}


@dataclass
class _Made:
    """Readings as a test sets them."""

    readings: Readings = field(default_factory=Readings)
    num_looks: int = 0

    def read(self) -> Readings:
        self.num_looks += 1
        return self.readings


def _settings(**table: object) -> RecutSettings:
    plain: Mapping[str, object] = {
        "share_adapter": True,
        "look_every_s": 1.0,
        "cool_down_s": 100.0,
        "return_cut": [2, 28],
    }
    return parse_settings(RecutSettings, {**plain, **table}, "test")


def _policy(sensors: _Made, cut: Cut = HOME, **table: object) -> RecutPolicy:
    return RecutPolicy(_settings(**table), cut, sensors)


def _memory(gb: float) -> Readings:
    return Readings(available_bytes=round(gb * GB))


@pytest.mark.parametrize(
    ("table", "readings", "cut", "said"),
    [
        ({"memory": MEMORY}, _memory(1.9), SMALL, "1.90 GB of memory are available, less than 2"),
        ({"battery": BATTERY}, Readings(battery_percent=29.0), Cut(1, 29), "at 29 percent"),
        ({"link": LINK}, Readings(link_mbit_s=4.9), LARGE, "carries 4.90 Mbit/s, less than 5"),
        ({"link": LINK}, Readings(rtt_ms=201.0), LARGE, "took 201 ms, more than 200"),
    ],
)
def test_each_threshold_wants_its_cut_and_says_why(
    table: dict[str, object], readings: Readings, cut: Cut, said: str
) -> None:
    policy = _policy(_Made(readings), **table)
    assert policy.wanted(0.0) == cut
    assert said in policy.reason


def test_nothing_is_wanted_while_all_is_well_or_unknown() -> None:
    tables = {"memory": MEMORY, "battery": BATTERY, "link": LINK}
    well = Readings(battery_percent=30.0, available_bytes=2 * GB, link_mbit_s=5.0, rtt_ms=200.0)
    for readings in (well, Readings(), Readings(link_mbit_s=float("nan"))):
        assert _policy(_Made(readings), **tables).wanted(0.0) is None


def test_without_policies_nobody_looks() -> None:
    sensors = _Made(_memory(0.1))
    policy = RecutPolicy(RecutSettings(share_adapter=True), HOME, sensors)
    assert policy.wanted(0.0) is None
    assert sensors.num_looks == 0


def test_the_greatest_harm_comes_first() -> None:
    bad = Readings(battery_percent=1.0, available_bytes=GB, link_mbit_s=0.1, rtt_ms=999.0)
    tables = {"memory": MEMORY, "battery": BATTERY, "link": LINK}
    assert _policy(_Made(bad), **tables).wanted(0.0) == SMALL
    del tables["memory"]
    assert _policy(_Made(bad), **tables).wanted(0.0) == Cut(1, 29)


def test_it_looks_only_as_often_as_it_is_told() -> None:
    sensors = _Made(_memory(9.0))
    policy = _policy(sensors, memory=MEMORY, look_every_s=10.0)
    for now_s in range(30):
        policy.wanted(float(now_s))
    assert sensors.num_looks == 3


def test_after_a_re_cut_it_cools_down_and_returns_beyond_the_margin_alone() -> None:
    sensors = _Made(_memory(1.0))
    policy = _policy(sensors, memory=MEMORY)
    assert policy.wanted(0.0) == SMALL
    policy.moved(SMALL, 5.0)
    assert policy.wanted(50.0) is None
    sensors.readings = _memory(9.0)
    assert policy.wanted(104.0) is None
    sensors.readings = _memory(1.0)
    assert policy.wanted(106.0) is None
    # Better than the threshold by less than the margin: still where it was.
    sensors.readings = _memory(2.3)
    assert policy.wanted(110.0) is None
    sensors.readings = _memory(2.4)
    assert policy.wanted(120.0) == HOME
    assert policy.reason == "battery, memory and link are well again"
    policy.moved(HOME, 121.0)
    assert policy.wanted(300.0) is None


def test_unknown_readings_change_nothing() -> None:
    sensors = _Made(_memory(1.0))
    policy = _policy(sensors, memory=MEMORY)
    assert policy.wanted(0.0) == SMALL
    policy.moved(SMALL, 0.0)
    sensors.readings = Readings()
    assert policy.wanted(500.0) is None


def test_mains_power_is_well_whatever_the_margin() -> None:
    sensors = _Made(Readings(battery_percent=94.0))
    battery = {"below_percent": 95.0, "cut": [1, 29]}
    policy = _policy(sensors, battery=battery, margin=5.0)
    assert policy.wanted(0.0) == Cut(1, 29)
    policy.moved(Cut(1, 29), 0.0)
    sensors.readings = Readings(battery_percent=100.0)
    assert policy.wanted(200.0) == HOME


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_a_delay_is_well_again_below_its_border(margin: float) -> None:
    sensors = _Made(Readings(rtt_ms=300.0))
    link = {"above_rtt_ms": 200.0, "cut": [5, 20]}
    policy = _policy(sensors, link=link, margin=margin)
    assert policy.wanted(0.0) == LARGE
    policy.moved(LARGE, 0.0)
    sensors.readings = Readings(rtt_ms=200.0)
    assert policy.wanted(200.0) == (HOME if margin == 0 else None)
    sensors.readings = Readings(rtt_ms=166.0)
    assert policy.wanted(202.0) == HOME


def test_a_return_that_does_not_last_makes_the_next_one_wait_twice_as_long() -> None:
    # What frees the memory is the move itself: without a longer wait it would go on for ever.
    sensors = _Made()
    policy = _policy(sensors, memory=MEMORY)
    cut, moves = HOME, list[tuple[float, Cut]]()
    for now_s in range(20_000):
        sensors.readings = _memory(1.0 if cut == HOME else 9.0)
        wish = policy.wanted(float(now_s))
        if wish is not None:
            policy.moved(wish, float(now_s))
            moves.append((float(now_s), wish))
            cut = wish
    away = [now_s for now_s, where in moves if where == SMALL]
    waits = [later - sooner for sooner, later in pairwise(away)]
    assert waits[:4] == pytest.approx([200, 300, 500, 900], abs=5)
    assert len(moves) < 20


def test_the_longest_wait_is_bounded_and_a_return_that_lasts_ends_it() -> None:
    sensors = _Made()
    policy = _policy(sensors, memory=MEMORY, cool_down_s=1.0, look_every_s=0.5)
    now_s = 0.0
    for _ in range(20):
        policy.moved(_wish(policy, sensors, 1.0, now_s), now_s)
        now_s += 64.0 + 1
        policy.moved(_wish(policy, sensors, 9.0, now_s), now_s)
        now_s += 1.0
    now_s += 1000.0
    policy.moved(_wish(policy, sensors, 1.0, now_s), now_s)
    assert _wish(policy, sensors, 9.0, now_s + 1.5) == HOME


def _wish(policy: RecutPolicy, sensors: _Made, gb: float, now_s: float) -> Cut:
    sensors.readings = _memory(gb)
    wish = policy.wanted(now_s)
    assert wish is not None
    return wish


def test_a_cut_that_somebody_commanded_is_not_undone() -> None:
    sensors = _Made(_memory(9.0))
    policy = _policy(sensors, memory=MEMORY)
    policy.moved(Cut(4, 20), 0.0)
    assert policy.wanted(1000.0) is None
    sensors.readings = _memory(1.0)
    assert policy.wanted(1010.0) == SMALL


def test_a_command_for_the_cut_that_is_there_changes_nothing() -> None:
    sensors = _Made(_memory(1.0))
    policy = _policy(sensors, memory=MEMORY)
    assert policy.wanted(0.0) == SMALL
    policy.moved(SMALL, 0.0)
    policy.moved(SMALL, 199.0)
    sensors.readings = _memory(9.0)
    assert policy.wanted(200.0) == HOME


def test_a_process_that_starts_where_a_policy_had_sent_it_returns() -> None:
    policy = _policy(_Made(_memory(9.0)), cut=SMALL, memory=MEMORY)
    assert policy.wanted(0.0) == HOME
    stays = _policy(_Made(_memory(9.0)), cut=SMALL, memory=MEMORY, return_cut=None)
    assert stays.wanted(0.0) is None


def test_without_consent_only_moves_that_show_nothing_are_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sensors = _Made(_memory(1.0))
    policy = _policy(sensors, memory=MEMORY, link=LINK, share_adapter=False)
    with caplog.at_level(logging.WARNING):
        for now_s in range(50):
            assert policy.wanted(float(now_s)) is None
    assert len(caplog.records) == 1
    assert "recut.share_adapter" in caplog.text
    assert "0:30" in caplog.text
    sensors.readings = Readings(available_bytes=9 * GB, link_mbit_s=1.0)
    assert policy.wanted(100.0) == LARGE


def test_a_refusal_is_said_once_and_the_cut_wanted_again_only_after_all_was_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sensors = _Made(_memory(1.0))
    policy = _policy(sensors, memory=MEMORY)
    with caplog.at_level(logging.WARNING):
        assert policy.wanted(0.0) == SMALL
        policy.refused("the server does not serve it")
        assert policy.wanted(200.0) is None
        sensors.readings = _memory(9.0)
        assert policy.wanted(210.0) is None
        sensors.readings = _memory(1.0)
        assert policy.wanted(220.0) == SMALL
        policy.refused("the server does not serve it")
        policy.refused("nobody asked")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "does not serve it" in caplog.text


@pytest.mark.parametrize(
    ("before", "after", "shows"),
    [
        (Cut(2, 28), Cut(1, 28), True),
        (Cut(2, 28), Cut(2, 29), True),
        (Cut(2, 28), Cut(4, 29), True),
        (Cut(2, 28), Cut(2, 28), False),
        (Cut(2, 28), Cut(5, 20), False),
    ],
)
def test_blocks_that_leave_the_client_show_what_they_learnt(
    before: Cut, after: Cut, shows: bool
) -> None:
    assert shows_blocks(before, after) is shows


@settings(max_examples=60, deadline=None)
@given(
    readings=st.lists(
        st.builds(
            Readings,
            battery_percent=st.none() | st.floats(0, 100),
            available_bytes=st.none() | st.integers(0, 9 * GB),
            link_mbit_s=st.none() | st.floats(0, 100),
            rtt_ms=st.none() | st.floats(0, 1000),
        ),
        max_size=60,
    )
)
def test_whatever_is_read_re_cuts_are_a_cool_down_apart_and_known(
    readings: list[Readings],
) -> None:
    sensors, moves, cut = _Made(), list[float](), HOME
    policy = _policy(sensors, memory=MEMORY, battery=BATTERY, link=LINK, share_adapter=False)
    for place, one in enumerate(readings):
        sensors.readings = one
        wish = policy.wanted(30.0 * place)
        if wish is not None:
            assert wish in {HOME, SMALL, LARGE, Cut(1, 29)}
            assert wish != cut
            assert not shows_blocks(cut, wish)
            policy.moved(wish, 30.0 * place)
            moves.append(30.0 * place)
            cut = wish
    assert all(later - sooner >= 100 for sooner, later in pairwise(moves))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"memory": {"below_gb": 0, "cut": [0, 30]}}, "memory.below_gb"),
        ({"memory": {"below_gb": 1, "cut": [5, 5]}}, "at least one block"),
        ({"memory": {"below_gb": 1}}, "memory.cut is required"),
        ({"battery": {"below_percent": 100, "cut": [0, 30]}}, "battery.below_percent"),
        ({"link": {"cut": [0, 30]}}, "below_mbit_s, above_rtt_ms or both"),
        ({"memory": MEMORY, "return_cut": [-1, 4]}, "at least one block"),
        ({"return_cut": [2, 28]}, "read by policies alone"),
        ({"look_every_s": 0}, "look_every_s"),
        ({"cool_down": 3}, "did you mean cool_down_s"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(table: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_settings(RecutSettings, table, "test")


def test_a_policy_in_a_federation_is_refused_as_it_would_never_act() -> None:
    table = {
        "model": {"path": "tiny", "lower": 1, "upper": 3},
        "connection": {"address": "127.0.0.1:1", "plaintext": True},
        "privacy": {"mechanism": "none"},
        "federation": {"name": "clinics"},
        "recut": {"memory": {"below_gb": 1, "cut": [1, 3]}},
    }
    with pytest.raises(ConfigError, match=r"policies of \[recut\] act between the steps"):
        parse_settings(ClientSettings, table, "test")
    parse_settings(ClientSettings, {**table, "recut": {"share_adapter": True}}, "test")
