"""A real store on the page."""

from dataclasses import replace
from pathlib import Path

from cutlayer.dashboard.federation_view import federation_view
from cutlayer.dashboard.view import MemberStatus, PublishedView
from cutlayer.federation.settings import FederationSettings, SecureSettings
from cutlayer.federation.status import Status
from cutlayer.federation.store import FederationStore
from tests.unit.dashboard.server_world import STATUS
from tests.unit.dashboard.store_world import BEGAN, new_store

SETTINGS = FederationSettings(name="reviews", rounds=10)


def _status(**changes: object) -> Status:
    return replace(STATUS, **changes)  # type: ignore[arg-type]


def test_rounds_members_and_published_numbers_are_those_of_the_store(tmp_path: Path) -> None:
    with new_store(tmp_path / "store", num_rounds=4) as store:
        view = federation_view(store, SETTINGS, _status())
    assert [r.round for r in view.rounds] == [1, 2, 3, 4]
    assert (view.rounds[1].num_attempts, view.rounds[1].stragglers) == (2, ("tweets",))
    assert view.rounds[1].num_survivors == 3
    assert view.rounds[0].ended_s == BEGAN.timestamp() + 60
    assert view.published[-1] == PublishedView(member="amazon", round=4, name="loss", value=0.5)
    assert {p.member for p in view.published} == {"amazon"}
    assert (view.name, view.strategy, view.is_secure) == ("reviews", "fedavg", True)


def test_what_a_member_does_is_what_the_coordinator_says(tmp_path: Path) -> None:
    with new_store(tmp_path / "store", num_rounds=4) as store:
        view = federation_view(store, SETTINGS, _status())
    assert {m.name: m.status for m in view.members} == {
        "amazon": MemberStatus.WAITING,
        "movies": MemberStatus.TRAINING,
        "nyt": MemberStatus.LEFT,
        "tweets": MemberStatus.STRAGGLER,
    }
    late = next(m for m in view.members if m.name == "tweets")
    assert (late.num_rounds, late.num_missed) == (2, 2)
    assert (view.round, view.waits_for) == (5, ("movies",))


def test_between_rounds_the_page_says_how_many_are_missing(tmp_path: Path) -> None:
    gathering = _status(stage="gathering", attempt=0, cohort=(), came=(), waiting=("amazon",))
    with new_store(tmp_path / "store") as store:
        view = federation_view(store, SETTINGS, gathering)
    assert view.phase == "1 members wait, 3 are needed"
    assert [m.status for m in view.members][:2] == [MemberStatus.WAITING, MemberStatus.AWAY]


def test_a_finished_and_a_stopped_federation_wait_for_nobody(tmp_path: Path) -> None:
    with new_store(tmp_path / "store") as store:
        ended = federation_view(store, SETTINGS, _status(stage="finished", round=10))
        stopped = federation_view(store, SETTINGS, _status(stage="stopped", stopped="too few"))
    assert (ended.is_finished, ended.round, ended.waits_for) == (True, 10, ())
    assert (stopped.is_finished, stopped.stopped, stopped.waits_for) == (False, "too few", ())


def test_a_federation_without_rounds_is_shown(tmp_path: Path) -> None:
    with FederationStore(tmp_path / "store", "reviews") as store:
        view = federation_view(store, SETTINGS, _status(round=0, stage="gathering", cohort=()))
    assert (view.members, view.rounds, view.published) == ((), (), ())


def test_a_hidden_sum_is_said(tmp_path: Path) -> None:
    secure = SecureSettings(hides_aggregate=True)
    settings = FederationSettings(name="x", rounds=1, secure=secure)
    with FederationStore(tmp_path / "store", "x") as store:
        view = federation_view(store, settings, _status())
    assert (view.is_secure, view.hides_aggregate) == (True, True)
