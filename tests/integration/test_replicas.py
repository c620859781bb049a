"""A hierarchical server of real processes: placement, a replica's death, the end of all."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from cutlayer import Client, ClientSettings
from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    TransportError,
)
from cutlayer.identity.provision import LocalFolders, local, member_files
from cutlayer.server.front import TrunkFront
from cutlayer.server.settings import BatchSettings, ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.wire.endpoints import ConnectionSettings, TlsFiles
from cutlayer.wire.frame import Frame
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.messages import Hello, Kind, PullAdapter, Welcome
from cutlayer.wire.replica_messages import Describe, TakeStats
from tests.federation_worlds import at_once, federation, owner_settings, owners
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

NAMES = ("bank", "clinic", "court")
ALONE = BatchSettings(max_clients=1, max_tokens=512)
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class World:
    """A model, certificates and a folder for everybody."""

    folder: Path
    model: Path
    kits: LocalFolders

    def server(self, **replicas: object) -> dict[str, object]:
        """A front's settings as plain values."""
        return {
            "model": {"path": str(self.model), "lower": 1, "upper": 3},
            "listen": {"address": "127.0.0.1:0", "tls": _tls(self.kits.server), "recheck_s": 0.2},
            "state": {"folder": str(self.folder / "server")},
            "replicas": {"count": 2, "threads": 1, "restart_delay_s": 0.1, **replicas},
            "drain_s": 5.0,
            # One client after the other, or who shares a call would change the last bits.
            "batch": ALONE.model_dump(),
        }

    def client(self, name: str, port: int, **changes: object) -> ClientSettings:
        """An owner's settings; its run folder is kept between calls."""
        settings = client_settings(self.model, private_folder(self.folder / name), **changes)
        connection = ConnectionSettings.model_validate(
            {
                "address": f"127.0.0.1:{port}",
                "tls": _tls(self.kits.clients[name]),
                "codec": "raw",
                "connect_timeout_s": 2.0,
            }
        )
        return settings.model_copy(update={"connection": connection})

    def hello(self, name: str, port: int) -> Frame:
        """What an owner says first."""
        with Client(self.client(name, port)) as client:
            own = client._own
        return Frame(
            Kind.HELLO,
            Hello(nonce="00" * 32, spec=own.spec.to_table(), leaves=dict(own.manifest.leaves)),
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def make_world(folder: Path) -> World:
    kits = local(private_folder(folder / "kits"), names=NAMES)
    return World(folder, tiny_llama_folder(folder), kits)


def _tls(kit: Path) -> dict[str, str]:
    files = member_files(kit)
    names = ("certificate", "key", "authority")
    return {name: str(getattr(files, name)) for name in names}


@contextmanager
def fronting(table: dict[str, object]) -> Iterator[TrunkFront]:
    """A front in this process; its replicas are processes."""
    front = TrunkFront(parse_settings(ServerSettings, table, "test front"))
    try:
        front.start()
        yield front
    finally:
        front.stop(grace_s=0)


@contextmanager
def serving(world: World) -> Iterator[tuple[int, psutil.Process]]:
    """`cutlayer serve --replicas 2`: its port and its process."""
    table = {**world.server(), "replicas": {"threads": 1, "restart_delay_s": 0.1}}
    config = world.folder / "server.toml"
    config.write_text(_toml(table))
    command = ["serve", "--config", str(config), "--replicas", "2", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "cutlayer.cli.main", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield _ready(process)["port"], psutil.Process(process.pid)
            process.send_signal(signal.SIGTERM)
            assert process.stdout is not None
            assert json.loads(process.stdout.readlines()[-1])["event"] == "stopped"
            assert process.wait(20) == 0
        finally:
            process.kill()


def _ready(process: "subprocess.Popen[str]") -> dict[str, int]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            ready: dict[str, int] = json.loads(line)
            assert ready["replicas"] == 2
            return ready
    raise AssertionError("the front did not start")


def _toml(table: dict[str, object], path: str = "") -> str:
    lines = []
    for key, value in table.items():
        place = f"{path}{key}"
        lines.append(
            _toml(value, f"{place}.") if isinstance(value, dict) else f"{place} = {value!r}\n"
        )
    return "".join(lines)


def _adapters(client: Client) -> dict[str, torch.Tensor]:
    step = client._state.saved_steps()[-1]
    tensors = client._state.load(step).tensors
    return {**tensors["head"], **tensors["tail"], **client.trunk.pull_adapter(client.run_id, step)}


TRAINING = {"train__steps": 16, "train__save_every": 3, "train__rows_per_step": 4}


def _alone(world: World, seed: int) -> tuple[list[StepRecord], dict[str, torch.Tensor]]:
    """The same run on one ordinary server that nobody kills."""
    folder = private_folder(world.folder / f"alone{seed}")
    settings = client_settings(world.model, folder, **TRAINING, train__seed=seed)
    with (
        running_server(server_settings(world.model, folder)) as server,
        client_of(server, settings) as client,
    ):
        return client.train().history, _adapters(client)


def test_every_client_ends_as_if_no_replica_had_been_killed(world: World) -> None:
    is_killed = threading.Event()
    with serving(world) as (port, process), ExitStack() as stack:
        replicas = sorted(process.children(), key=lambda child: child.create_time())
        assert len(replicas) == 2
        # One after the other: building a model is not for several threads at once.
        clients = [
            stack.enter_context(Client(world.client(name, port, **TRAINING, train__seed=seed)))
            for seed, name in enumerate(NAMES)
        ]

        def kill(report: Report) -> None:
            if report.record.step == 8 and not is_killed.is_set():
                replicas[0].send_signal(signal.SIGKILL)
                is_killed.set()

        def train(client: Client) -> tuple[list[StepRecord], dict[str, torch.Tensor]]:
            return client.train(kill).history, _adapters(client)

        with ThreadPoolExecutor(len(NAMES)) as pool:
            results = list(pool.map(train, clients))
        _wait_until(lambda: len(process.children()) == 2)
        children = process.children()
    assert is_killed.is_set()
    assert replicas[0].pid not in [child.pid for child in children]
    for seed, (history, adapters) in enumerate(results):
        expected_history, expected = _alone(world, seed)
        assert history == expected_history
        assert adapters.keys() == expected.keys()
        assert all(torch.equal(adapters[key], expected[key]) for key in expected)
    _wait_until(lambda: not any(_is_running(child) for child in children))


def test_rounds_over_replicas_equal_rounds_on_one_server_although_one_dies(world: World) -> None:
    rules = federation(rounds=2, secure={"enabled": False})
    changes: dict[str, object] = {"federation__share_plain_updates": True}
    alone = private_folder(world.folder / "alone")
    single = server_settings(world.model, alone, federation=rules)
    with running_server(single.model_copy(update={"batch": ALONE})) as server:
        expected = _train_together(owners(server, world.model, alone, NAMES, **changes))
        assert server.federation is not None
        expected_trunk = server.federation._coordinator.trunk_state(NAMES[0])
    with fronting({**world.server(), "federation": rules}) as front:
        clients = []
        for number, name in enumerate(NAMES):
            settings = owner_settings(world.model, world.folder, name, 8 + 4 * number, **changes)
            connection = _connection(world, f"127.0.0.1:{front.port}", name)
            raw = connection.model_copy(update={"codec": "raw"})
            clients.append(Client(settings.model_copy(update={"connection": raw})))
        assert front.federation is not None
        store = front.federation.store
        pid = _pid(front, 0)

        def kill() -> None:
            _wait_until(lambda: len(store.rounds(None)) >= 1)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        ends = _train_together(clients)
        killer.join()
        trunk = front.federation._coordinator.trunk_state(NAMES[0])
        assert len(store.rounds(None)) == 2
        assert {len(row.survivors) for row in store.rounds(None)} == {3}
    for ours, theirs in zip([*ends, trunk], [*expected, expected_trunk], strict=True):
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-7)


def _train_together(clients: list[Client]) -> list[dict[str, torch.Tensor]]:
    try:
        at_once([client.train for client in clients])
        states = [client._parts.adapter_states() for client in clients]
    finally:
        for client in clients:
            client.close()
    return [{**state["head"], **state["tail"]} for state in states]


def test_clients_are_spread_stay_where_they_are_and_move_only_from_the_dead(world: World) -> None:
    with fronting(world.server()) as front:
        first = [_place(world, front, name) for name in NAMES]
        assert first[0] == first[2] != first[1]
        assert [_place(world, front, name) for name in NAMES] == first
        victim = next(r for r in front.replicas() if r.address == first[0])
        os.kill(_pid(front, victim.index), signal.SIGKILL)
        assert {_place(world, front, name) for name in NAMES} == {first[1]}
        _wait_until(lambda: front.replicas()[victim.index].pid not in (None, victim.pid))
        again = front.replicas()[victim.index]
        assert again.num_restarts == 1
        assert [_place(world, front, name) for name in NAMES] == [first[1]] * 3
        _wait_until(lambda: front.replicas()[victim.index].stats is not None)
        text = front.metrics().decode()
        assert f'cutlayer_replica_restarts{{replica="{victim.index}"}} 1.0' in text
        assert f'cutlayer_replica_clients{{replica="{1 - victim.index}"}} 3.0' in text


def test_a_replica_that_cannot_start_is_a_clear_error_and_leaves_nothing(world: World) -> None:
    table = world.server(count=1)
    table["model"] = {"path": str(world.model), "lower": 1, "upper": 9}
    with pytest.raises(ConfigError, match="upper"), fronting(table):
        pass
    assert not [c for c in psutil.Process().children() if "cutlayer.server.replica" in c.cmdline()]


@pytest.fixture(scope="module")
def solo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, TrunkFront]]:
    """A front with one replica, for tests that leave it running."""
    world = make_world(tmp_path_factory.mktemp("solo"))
    with fronting(world.server(count=1, stall_s=3.0)) as front:
        yield world, front


def test_a_front_computes_nothing_and_its_orders_are_not_for_members(
    solo: tuple[World, TrunkFront],
) -> None:
    world, front = solo
    pull = Frame(Kind.PULL_ADAPTER, PullAdapter(run_id="r", step=1))
    with _channel(world, f"127.0.0.1:{front.port}") as channel:
        with pytest.raises(ProtocolError, match="before HELLO"):
            channel.call(pull).result(20)
        welcome = channel.call(world.hello("bank", front.port)).result(20).header
        assert isinstance(welcome, Welcome)
        with pytest.raises(ProtocolError, match="WELCOME names"):
            channel.call(pull).result(20)
    with _channel(world, welcome.place) as channel:
        channel.call(world.hello("bank", front.port)).result(20)
        for order in (Frame(Kind.DESCRIBE, Describe()), Frame(Kind.TAKE_STATS, TakeStats())):
            with pytest.raises(ProtocolError, match="not for a server"):
                channel.call(order).result(20)


def test_a_members_certificate_does_not_reach_a_replicas_orders(
    solo: tuple[World, TrunkFront],
) -> None:
    world, front = solo
    life = front._group._slots[0].life
    assert life is not None
    with pytest.raises(CutlayerError) as refused:
        GrpcChannel(_connection(world, life.launched.admin_address))
    assert isinstance(refused.value, PermissionRefused | TransportError)


def test_a_replica_that_hangs_is_killed_and_started_again(solo: tuple[World, TrunkFront]) -> None:
    _, front = solo
    pid = _pid(front, 0)
    os.kill(pid, signal.SIGSTOP)
    _wait_until(lambda: front.replicas()[0].pid not in (None, pid))
    assert not psutil.pid_exists(pid)


def test_with_no_replica_left_clients_are_asked_to_come_back(
    solo: tuple[World, TrunkFront],
) -> None:
    world, front = solo
    hello = world.hello("bank", front.port)
    with _channel(world, f"127.0.0.1:{front.port}") as channel:
        os.kill(_pid(front, 0), signal.SIGKILL)
        with pytest.raises(TransportError, match="no replica"):
            channel.call(hello).result(20)


@contextmanager
def _channel(world: World, address: str, name: str = "bank") -> Iterator[GrpcChannel]:
    channel = GrpcChannel(_connection(world, address, name))
    try:
        yield channel
    finally:
        channel.close()


def _connection(world: World, address: str, name: str = "bank") -> ConnectionSettings:
    tls = TlsFiles.model_validate(_tls(world.kits.clients[name]))
    return ConnectionSettings(address=address, tls=tls, connect_timeout_s=2.0)


def _place(world: World, front: TrunkFront, name: str) -> str:
    with _channel(world, f"127.0.0.1:{front.port}", name) as channel:
        welcome = channel.call(world.hello(name, front.port)).result(20).header
        assert isinstance(welcome, Welcome)
        return welcome.place


def _pid(front: TrunkFront, index: int) -> int:
    pid = front.replicas()[index].pid
    assert pid is not None
    return pid


def _is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running())
    return False


def _wait_until(is_so: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < give_up_s, "it did not happen"
        time.sleep(0.05)
