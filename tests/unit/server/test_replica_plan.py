"""Replicas' settings: what they share with their front and what is their own."""

from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, ModelError, TransportError
from cutlayer.identity.provision import local, member_files
from cutlayer.server.launchers import ready_or_raise
from cutlayer.server.replica import Ready, plan_line, read_plan
from cutlayer.server.replica_plan import num_threads, plan_replica, public_host
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.wire.endpoints import TlsFiles

ADMIN = TlsFiles(certificate=Path("c.pem"), key=Path("k.pem"), authority=Path("a.pem"))


def front(folder: Path, address: str = "127.0.0.1:7443", **replicas: object) -> ServerSettings:
    table: dict[str, object] = {
        "model": {"path": "model", "lower": 1, "upper": 3, "digest": "ab" * 32},
        "listen": {"address": address, "plaintext": True, "max_streams": 7},
        "state": {"folder": str(private_folder(folder / "state"))},
        "replicas": {"count": 2, **replicas},
        "health_port": 0,
        "federation": {"name": "study", "rounds": 3},
    }
    return parse_settings(ServerSettings, table, "test")


def test_a_replica_has_the_fronts_model_and_limits_but_its_own_port_and_folder(
    tmp_path: Path,
) -> None:
    settings = front(tmp_path, threads=3, first_port=7500)
    plans = [plan_replica(settings, index, ADMIN).server for index in (0, 1)]
    assert [plan.listen.address for plan in plans] == ["127.0.0.1:7500", "127.0.0.1:7501"]
    assert plans[0].state.folder != plans[1].state.folder
    for plan in plans:
        assert plan.model == settings.model.model_copy(update={"threads": 3})
        assert plan.limits == settings.limits
        assert plan.listen.max_streams == 7


def test_what_is_the_fronts_alone_is_not_the_replicas(tmp_path: Path) -> None:
    plan = plan_replica(front(tmp_path), 0, ADMIN).server
    assert plan.replicas.count == 0, "a replica must not start replicas"
    assert plan.federation is None
    assert plan.health_port is None


def test_replicas_share_runs_so_that_any_can_open_any(tmp_path: Path) -> None:
    settings = front(tmp_path)
    folders = [plan_replica(settings, index, ADMIN).server.state.folder for index in (0, 1)]
    (folders[0] / "runs" / "clinic").mkdir()
    assert (folders[1] / "runs" / "clinic").is_dir()
    assert (settings.state.folder / "runs" / "clinic").is_dir()


def test_a_state_folder_that_was_moved_is_linked_anew(tmp_path: Path) -> None:
    plan_replica(front(tmp_path), 0, ADMIN)
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    moved = private_folder(tmp_path / "moved")
    (tmp_path / "elsewhere").rename(moved / "state")
    own = plan_replica(front(moved), 0, ADMIN).server.state.folder
    assert (own / "runs").resolve() == (moved / "state" / "runs").resolve()


def test_a_plan_survives_its_way_to_another_process(tmp_path: Path) -> None:
    plan = plan_replica(front(tmp_path), 1, ADMIN)
    line = plan_line(plan)
    assert "\n" not in line
    assert read_plan(line) == plan


def test_cores_are_shared_out_unless_threads_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert num_threads(front(tmp_path)) == 4
    assert num_threads(front(tmp_path, count=3)) == 2
    assert num_threads(front(tmp_path, count=100)) == 1
    assert num_threads(front(tmp_path, threads=5)) == 5


def test_clients_are_sent_to_a_host_that_the_certificate_names(tmp_path: Path) -> None:
    kits = local(private_folder(tmp_path / "kits"), hosts=("trunk.example.org", "10.0.0.7"))
    files = member_files(kits.server)
    tls = TlsFiles(certificate=files.certificate, key=files.key, authority=files.authority)

    def host(address: str, **replicas: object) -> str:
        settings = front(tmp_path, **replicas)
        listen = settings.listen.model_copy(
            update={"address": address, "tls": tls, "plaintext": False}
        )
        return public_host(settings.model_copy(update={"listen": listen}))

    assert host("0.0.0.0:7443") == "trunk.example.org"
    assert host("10.0.0.7:7443") == "10.0.0.7"
    assert host("127.0.0.1:7443") == "trunk.example.org"
    assert host("0.0.0.0:7443", host="replicas.example.org") == "replicas.example.org"


def test_an_address_without_a_host_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"replicas\.host"):
        public_host(front(tmp_path, address="0.0.0.0:7443"))
    assert public_host(front(tmp_path)) == "127.0.0.1"


def test_what_a_replica_says_at_its_start_is_read_as_what_it_means() -> None:
    ready = '{"type": "Ready", "port": 1, "admin_port": 2}'
    assert ready_or_raise(ready) == Ready(port=1, admin_port=2)
    with pytest.raises(ModelError, match="no blocks"):
        ready_or_raise('{"type": "NotReady", "code": "ModelError", "message": "no blocks"}')
    for said in ("", "Killed", "{}"):
        with pytest.raises(TransportError, match="ended before"):
            ready_or_raise(said)
