"""A server's public names as the page's view."""

from pathlib import Path

from cutlayer.dashboard.server_view import OneServerView
from cutlayer.dashboard.view import RunView
from cutlayer.metrics import Totals
from tests.unit.dashboard.server_world import StandInFederation, StandInServer
from tests.unit.dashboard.store_world import new_store


def test_every_number_is_where_it_belongs() -> None:
    view = OneServerView(StandInServer(), None)
    now = view.snapshot()
    assert view.is_ready()
    assert view.metrics() == b"cutlayer_runs 2.0\n"
    assert view.totals() == now.totals == Totals(tokens=1, bytes_up=2, bytes_down=3)
    assert (now.num_connections, now.num_sessions) == (5, 6)
    assert (now.cache_bytes, now.graph_bytes) == (7, 8)
    assert now.runs == (
        RunView(owner="amazon", run_id="r1", step=9),
        RunView(owner="nyt", run_id="r2", step=7),
    )
    assert now.federation is None
    assert now.software.startswith("cutlayer ")
    assert now.assurance == "SIMULATED"


def test_a_replica_that_is_down_is_shown_with_its_clients() -> None:
    (replica,) = OneServerView(StandInServer(), None).snapshot().replicas
    assert not replica.is_alive
    assert (replica.name, replica.num_restarts) == ("replica 1", 3)
    assert replica.members == ("amazon", "nyt")


def test_the_federation_is_read_anew_each_time(tmp_path: Path) -> None:
    with new_store(tmp_path / "store", num_rounds=4) as store:
        view = OneServerView(StandInServer(), StandInFederation(store))
        before = view.snapshot().federation
        store.publish("movies", 4, {"loss": 1.25})
        after = view.snapshot().federation
        view.close()
    assert before is not None
    assert after is not None
    assert len(after.published) == len(before.published) + 1
