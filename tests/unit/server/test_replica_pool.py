"""The pool over replicas: every order reaches the right replica, over real encoded frames."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import pytest
import torch

from cutlayer.errors import PermissionRefused, ProtocolError, TransportError
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.model.manifest import Manifest
from cutlayer.server.handshake import ServedModel
from cutlayer.server.replica_admin import AdminService
from cutlayer.server.replica_group import Placed
from cutlayer.server.replica_link import ReplicaLink
from cutlayer.server.replica_pool import ReplicaPool
from cutlayer.server.runner import Runner
from cutlayer.server.scheduler import FairScheduler
from cutlayer.wire.channel import LoopbackChannel, Peer
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind, PullAdapter
from cutlayer.wire.replica_messages import Collect, Stats
from cutlayer.wire.spec import Spec

FRONT = Peer(name="front", roles=frozenset({"serve"}), serial=None, address="test")
RUN = "study.r1.a1"
LORA = AdapterSettings(rank=2)
KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


class Host:
    """Keeps what a replica was told; `train` is what a member's steps would do."""

    def __init__(self) -> None:
        self.rounds: dict[str, dict[str, AdapterState]] = {}
        self.trained: dict[str, int] = {}
        self.num_begins = 0

    def adapter_layout(self, adapter: AdapterSettings) -> Mapping[str, list[int]]:
        return {KEY: [adapter.rank, 4]}

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        assert adapter == LORA
        self.num_begins += 1
        self.rounds.setdefault(run_id, {}).update(states)

    def train(self, member: str, num_tokens: int) -> None:
        self.trained[member] = num_tokens

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        assert kind is UpdateKind.DELTA
        starts = self.rounds.get(run_id, {})
        return {
            name: TrunkUpdate(
                state={k: x + self.trained[name] for k, x in starts[name].items()},
                weight=self.trained[name],
            )
            for name in members
            if name in starts and name in self.trained
        }

    def end_round(self, run_id: str) -> None:
        self.rounds.pop(run_id, None)


class Fleet:
    """Replicas in this process, behind real links; stands for `ReplicaGroup`."""

    def __init__(self, num_replicas: int) -> None:
        self.hosts = [Host() for _ in range(num_replicas)]
        self.runner = Runner(FairScheduler())
        self._links = [self._link(host) for host in self.hosts]
        self.where: dict[str, int] = {}

    def place(self, client: str) -> Placed:
        index = self.where[client]
        return Placed(address=f"replica:{index}", link=self._links[index])

    def links(self) -> list[ReplicaLink]:
        return list(self._links)

    def restart(self, index: int) -> None:
        self._links[index].close()
        self.hosts[index] = Host()
        self._links[index] = self._link(self.hosts[index])

    def kill(self, index: int) -> None:
        self._links[index].close()

    def _link(self, host: Host) -> ReplicaLink:
        service = AdminService(MODEL, host, self.runner, lambda: STATS)
        return ReplicaLink(LoopbackChannel(service, FRONT))


MODEL = ServedModel(
    spec=Spec(
        model_type="llama",
        n_block=4,
        lower=1,
        upper=3,
        hidden_size=4,
        dtype="float32",
        codec_up="raw",
        codec_down="raw",
    ),
    manifest=Manifest({"block.1": "ab" * 32}),
    digest=None,
    boot_id="boot",
    software="test",
)
STATS = Stats(
    num_tokens=7,
    bytes_up=1,
    bytes_down=2,
    num_waiting=0,
    num_connections=1,
    num_runs=1,
    num_sessions=0,
    cache_bytes=0,
    graph_bytes=0,
)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(2)


def state(value: float) -> AdapterState:
    return {KEY: torch.full((2, 4), value)}


def test_each_member_is_told_and_asked_where_it_is(fleet: Fleet) -> None:
    fleet.where = {"a": 0, "b": 1, "c": 1}
    pool = ReplicaPool(fleet)
    pool.begin_round(RUN, LORA, {"a": state(1.0), "b": state(2.0), "c": state(3.0)})
    assert set(fleet.hosts[0].rounds[RUN]) == {"a"}
    assert set(fleet.hosts[1].rounds[RUN]) == {"b", "c"}
    fleet.hosts[0].train("a", 10)
    fleet.hosts[1].train("c", 30)
    updates = pool.collect(RUN, ["a", "b", "c"], UpdateKind.DELTA)
    assert {name: update.weight for name, update in updates.items()} == {"a": 10, "c": 30}
    assert torch.equal(updates["c"].state[KEY], torch.full((2, 4), 33.0))
    pool.end_round(RUN)
    assert [host.rounds for host in fleet.hosts] == [{}, {}]
    assert pool.collect(RUN, ["a"], UpdateKind.DELTA) == {}


def test_members_with_the_same_start_share_one_frame_per_replica(fleet: Fleet) -> None:
    fleet.where = {"a": 0, "b": 1, "c": 1}
    common = state(1.0)
    ReplicaPool(fleet).begin_round(RUN, LORA, {name: dict(common) for name in "abc"})
    assert [host.num_begins for host in fleet.hosts] == [1, 1]
    assert torch.equal(fleet.hosts[1].rounds[RUN]["c"][KEY], common[KEY])


def test_members_of_different_cuts_start_from_their_own_blocks(fleet: Fleet) -> None:
    """A deeper cut leaves the replica fewer of the same tensors."""
    fleet.where = dict.fromkeys("abc", 0)
    other = KEY.replace("layers.1.", "layers.2.")
    whole = {**state(1.0), other: torch.ones(2, 4)}
    starts = {"a": whole, "b": {KEY: whole[KEY]}, "c": {other: whole[other]}}
    ReplicaPool(fleet).begin_round(RUN, LORA, starts)
    found = fleet.hosts[0].rounds[RUN]
    assert {name: set(x) for name, x in found.items()} == {n: set(x) for n, x in starts.items()}


def test_a_member_that_moved_finds_its_start_on_the_new_replica(fleet: Fleet) -> None:
    fleet.where = {"a": 0, "b": 1}
    pool = ReplicaPool(fleet)
    pool.begin_round(RUN, LORA, {"a": state(1.0), "b": state(2.0)})
    fleet.hosts[0].train("a", 5)
    fleet.kill(0)
    fleet.where["a"] = 1
    pool.follow("a")
    pool.follow("b")
    assert set(fleet.hosts[1].rounds[RUN]) == {"a", "b"}
    assert fleet.hosts[1].num_begins == 2, "who stayed is not told again"
    fleet.hosts[1].train("a", 9)
    assert pool.collect(RUN, ["a"], UpdateKind.DELTA)["a"].weight == 9


def test_a_restarted_replica_is_told_again_although_its_place_is_the_same(fleet: Fleet) -> None:
    fleet.where = {"a": 0}
    pool = ReplicaPool(fleet)
    pool.begin_round(RUN, LORA, {"a": state(1.0)})
    fleet.restart(0)
    assert fleet.hosts[0].rounds == {}
    pool.follow("a")
    assert set(fleet.hosts[0].rounds[RUN]) == {"a"}


def test_members_of_a_dead_replica_are_absent_from_the_sum(fleet: Fleet) -> None:
    fleet.where = {"a": 0, "b": 1}
    pool = ReplicaPool(fleet)
    pool.begin_round(RUN, LORA, {"a": state(1.0), "b": state(2.0)})
    fleet.hosts[0].train("a", 5)
    fleet.hosts[1].train("b", 6)
    fleet.kill(0)
    assert set(pool.collect(RUN, ["a", "b"], UpdateKind.DELTA)) == {"b"}
    pool.end_round(RUN)


def test_a_round_begins_although_a_replica_cannot_be_told(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cutlayer.server.replica_pool._RETRY_S", 0.0)
    fleet.where = {"a": 0, "b": 1}
    fleet.kill(0)
    pool = ReplicaPool(fleet)
    pool.begin_round(RUN, LORA, {"a": state(1.0), "b": state(2.0)})
    assert set(fleet.hosts[1].rounds[RUN]) == {"b"}
    with pytest.raises(TransportError, match="stay up"):
        pool.follow("a")
    fleet.where["a"] = 1
    pool.follow("a")
    assert set(fleet.hosts[1].rounds[RUN]) == {"a", "b"}


def test_the_layout_is_asked_of_whoever_is_up_and_remembered(fleet: Fleet) -> None:
    pool = ReplicaPool(fleet)
    fleet.kill(0)
    assert pool.layout(LORA) == {KEY: [2, 4]}
    fleet.kill(1)
    assert pool.layout(LORA) == {KEY: [2, 4]}
    with pytest.raises(TransportError, match="no replica"):
        pool.layout(AdapterSettings(rank=3))


def test_a_replica_tells_what_it_serves_and_how_busy_it_is(fleet: Fleet) -> None:
    link = fleet.links()[0]
    assert link.describe().spec == MODEL.spec.to_table()
    assert link.stats(5.0) == STATS


def test_only_a_certificate_with_the_role_serve_may_give_orders() -> None:
    service = AdminService(MODEL, Host(), Runner(FairScheduler()), lambda: STATS)
    member = Peer(name="clinic", roles=frozenset({"train"}), serial=None, address="test")
    with pytest.raises(PermissionRefused, match="clinic may not give orders"):
        service.connect(member)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.PULL_ADAPTER, PullAdapter(run_id="r", step=1)),
        Frame(Kind.COLLECT, Collect(run_id=RUN, member="a", kind="weights")),
    ],
    ids=["a member's call", "an unknown kind of update"],
)
def test_what_is_no_order_is_refused(frame: Frame) -> None:
    service = AdminService(MODEL, Host(), Runner(FairScheduler()), lambda: STATS)
    future: Future[Frame] = LoopbackChannel(service, FRONT).call(frame)
    with pytest.raises(ProtocolError):
        future.result(10)
