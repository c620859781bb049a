"""Members and servers that come late, leave, die, forge or differ: the others go on."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from benchmarks.fault_corrupt import corrupted
from cutlayer import Client, TrunkServer
from cutlayer.errors import ConfigError, CutlayerError, SpecMismatch, StorageError, TransportError
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.server.local_pool import LocalPool
from cutlayer.wire.channel import Channel
from cutlayer.wire.federation_messages import ShareSecrets
from cutlayer.wire.frame import Frame
from tests.federation_worlds import NAMES, at_once, federation, owner_settings, owners
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, loopback, running_server, server_settings


def _same(clients: list[Client]) -> bool:
    states = [client._parts.adapter_states() for client in clients]
    return all(
        torch.equal(x, other[part][key])
        for other in states[1:]
        for part in ("head", "tail")
        for key, x in states[0][part].items()
    )


def _close(clients: list[Client]) -> None:
    for client in clients:
        client.close()


def test_a_member_of_other_adapter_settings_is_told_which_and_others_go_on(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path, federation=federation())) as server:
        clients = owners(server, model, tmp_path)
        odd = client_of(server, owner_settings(model, tmp_path, "odd", adapter__rank=2), "odd")
        with pytest.raises(SpecMismatch, match="rank"):
            odd.train()
        at_once([client.train for client in clients])
        assert _same(clients)
        _close([*clients, odd])


def test_plain_aggregation_needs_the_owner_s_word(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    rules = federation(secure={"enabled": False})
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path)
        with pytest.raises(ConfigError, match="share_plain_updates"):
            clients[0].train()
        assert clients[0].ledger.num_lines == 0
        _close(clients)


def test_a_client_of_no_federation_is_told_so(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, owner_settings(model, tmp_path, "anna"), "anna") as client,
        pytest.raises(CutlayerError, match="coordinates no federation"),
    ):
        client.train()


def test_a_late_joiner_takes_part_from_the_next_round_on(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    rules = federation(rounds=4)
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path)
        late = client_of(server, owner_settings(model, tmp_path, "late"), "late")

        def join_late() -> object:
            while server.federation is not None and server.federation.store.round < 1:
                time.sleep(0.02)
            return late.train()

        at_once([*(client.train for client in clients), join_late])
        assert _same([*clients, late])
        rows = {row.name: row.num_rounds for row in server.federation.store.members()}
        _close([*clients, late])
    assert rows["anna"] == 4
    assert rows["late"] in {1, 2, 3}


def test_a_hidden_aggregate_reaches_a_late_joiner_too(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    key = tmp_path / "group.key"
    GroupKey.create(key)
    rules = federation(rounds=4, secure={"hides_aggregate": True})
    changes = {"federation__group_key_file": str(key)}
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path, **changes)
        late = client_of(server, owner_settings(model, tmp_path, "late", **changes), "late")

        def join_late() -> object:
            while server.federation is not None and server.federation.store.round < 2:
                time.sleep(0.02)
            return late.train()

        at_once([*(client.train for client in clients), join_late])
        assert _same([*clients, late])
        _close([*clients, late])


def test_a_member_that_stops_in_training_is_left_out_and_may_return(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    rules = federation(rounds=3, phase_deadline_s=1.0, round_deadline_s=4.0)
    names = (*NAMES, "dora")
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path, names)
        quits = threading.Event()

        def quit_after_one_step(report: object) -> None:
            quits.set()
            raise KeyboardInterrupt

        def stops_once() -> object:
            with pytest.raises(KeyboardInterrupt):
                clients[3].train(quit_after_one_step)
            return clients[3].train()

        at_once([*(client.train for client in clients[:3]), stops_once])
        assert quits.is_set()
        assert _same(clients)
        straggled = {r.name: r.num_straggled for r in server.federation.store.members()}
        _close(clients)
    assert straggled["dora"] >= 1
    assert straggled["anna"] == 0


def test_a_restarted_server_goes_on_after_its_last_round(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = server_settings(model, tmp_path, federation=federation(rounds=4, local_steps=3))
    world: dict[str, TrunkServer] = {"server": TrunkServer(settings)}
    clients = [_reconnecting(world, owner_settings(model, tmp_path, name), name) for name in NAMES]

    def restart() -> None:
        while world["server"].federation.store.round < 1:
            time.sleep(0.01)
        old = world.pop("server")
        old.stop(grace_s=0)
        world["server"] = TrunkServer(settings)

    at_once([*(client.train for client in clients), restart])
    server = world["server"]
    assert _same(clients)
    assert server.federation.store.round == 4
    _close(clients)
    server.stop(grace_s=0)


def test_a_coordinator_from_an_older_backup_is_found_out(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = server_settings(model, tmp_path, federation=federation(rounds=2))
    with running_server(settings) as server:
        clients = owners(server, model, tmp_path)
        at_once([client.train for client in clients])
        _close(clients)
    fresh = server_settings(model, tmp_path / "older", federation=federation(rounds=2))
    (tmp_path / "older").mkdir(mode=0o700)
    with running_server(fresh) as server:
        with (
            client_of(server, owner_settings(model, tmp_path, "anna"), "anna") as client,
            pytest.raises(StorageError, match="older backup"),
        ):
            client.train()
        accepted = owners(server, model, tmp_path, federation__accept_rollback=True)
        at_once([client.train for client in accepted])
        assert _same(accepted)
        _close(accepted)


def _reconnecting(world: dict[str, TrunkServer], settings: object, name: str) -> Client:
    def connect() -> object:
        server = world.get("server")
        if server is None:
            raise TransportError("the server is away")
        return loopback(server, name=name)

    return Client(settings, connect=connect)


def test_a_round_begun_again_releases_the_same_activations_with_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh noise in each attempt would let a server average it away, attempt by attempt."""
    model = tiny_llama_folder(tmp_path)
    rules = federation(rounds=1, local_steps=1)
    failures = [TransportError("a replica was lost")]
    collect = LocalPool.collect

    def lost_once(pool: LocalPool, *call: object) -> object:
        if failures:
            raise failures.pop()
        return collect(pool, *call)

    monkeypatch.setattr(LocalPool, "collect", lost_once)
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path)
        at_once([client.train for client in clients])
        assert server.federation.store.rounds()[0].attempts == 2
        ledgers = [client.ledger for client in clients]
        _close(clients)
    for ledger in ledgers:
        assert ledger.num_vectors["updates"] == 2
        assert ledger.num_replayed_vectors >= ledger.num_vectors["activations"]


def test_a_member_is_not_discouraged_by_attempts_that_others_spoil(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    rules = federation(rounds=1, max_attempts=20, phase_deadline_s=2.0, round_deadline_s=4.0)
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path)

        def quit_after_one_step(report: object) -> None:
            raise KeyboardInterrupt

        def stops_often() -> object:
            for _ in range(7):
                with pytest.raises(KeyboardInterrupt):
                    clients[2].train(quit_after_one_step)
            return clients[2].train()

        at_once([clients[0].train, clients[1].train, stops_often])
        assert _same(clients)
        assert server.federation.store.rounds()[0].attempts > 6
        _close(clients)


def test_one_member_s_nonsense_for_shares_does_not_end_the_others(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    rules = federation(rounds=1, phase_deadline_s=1.0, round_deadline_s=4.0)
    with running_server(server_settings(model, tmp_path, federation=rules)) as server:
        clients = owners(server, model, tmp_path, NAMES[:2])
        lies: list[Frame] = []
        settings = owner_settings(model, tmp_path, "cleo")
        liar = Client(settings, connect=lambda: _Lying(loopback(server, name="cleo"), lies))
        at_once([client.train for client in (*clients, liar)])
        assert len(lies) == 1
        assert _same([*clients, liar])
        assert server.federation.store.rounds()[0].survivors == list(NAMES)
        _close([*clients, liar])


class _Lying:
    """A channel whose member leaves, once, shares that nobody can open."""

    def __init__(self, inner: Channel, lies: list[Frame]) -> None:
        self._inner, self._lies = inner, lies

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        if isinstance(frame.header, ShareSecrets) and not self._lies:
            self._lies.append(frame)
            frame = corrupted(frame, pick=0.0)
        return self._inner.call(frame, deadline_s)
