"""Evidence in both directions, released keys, replicas, and settings that cannot be kept."""

from contextlib import AbstractContextManager
from functools import partial

import pytest

from cutlayer import Client, ServerSettings, TrunkServer
from cutlayer.cli.checks import check_server
from cutlayer.errors import AttestationError, ConfigError, StorageError
from cutlayer.server.front import TrunkFront
from cutlayer.server.replica_settings import ReplicaSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.storage.vault import AesVault, new_key_file
from cutlayer.tee.refusal import Refusal
from cutlayer.wire.attest_messages import Challenge, Proof
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Hello, Kind
from tests.attested_worlds import AttestedWorld, Served, refusal_of, tls_of
from tests.federation_worlds import NAMES, at_once, federation

WRONG = bytes(48)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AttestedWorld:
    return AttestedWorld.make(tmp_path_factory.mktemp("attested"))


def mutual(world: AttestedWorld) -> AbstractContextManager[Served]:
    """A server that wants evidence of its clients."""
    return world.serving(world.server("mutual", client_policy=world.policy("laptop")))


def test_both_sides_attest_where_the_server_wants_it(world: AttestedWorld) -> None:
    wish = {"policy": world.policy(), "attester": world.attester("laptop"), "reattest_s": 1e-6}
    with mutual(world) as served, Client(world.client(served.port, wish)) as client:
        client.train()
    kinds = served.arrived.kinds
    assert kinds[:2] == [Kind.HELLO, Kind.EVIDENCE]
    assert kinds.count(Kind.CHALLENGE) == kinds.count(Kind.EVIDENCE) - 1
    log = (world.folder / "mutual" / "audit.jsonl").read_text()
    assert '"assurance":"SIMULATED"' in log.replace(" ", "")


def test_a_server_takes_no_call_of_a_client_without_evidence(world: AttestedWorld) -> None:
    with mutual(world) as served:
        said = refusal_of(world, served)
        assert said.refusal == Refusal.NO_EVIDENCE
        assert "set tee.attester" in str(said)
        with Client(world.client(served.port)) as client:
            assert client.attestation is not None
            # A client that leaves its part out: its hand is forced, and the server refuses.
            channel = client.attestation.open(client.settings.connection)
            inner = channel._inner  # type: ignore[attr-defined]
            hello = Hello(
                nonce="00" * 32,
                spec=client._own.spec.to_table(),
                leaves=dict(client._own.manifest.leaves),
            )
            inner.call(Frame(Kind.HELLO, hello)).result(5)
            opened = client._open_run(client.settings.train)  # type: ignore[arg-type]
            with pytest.raises(AttestationError, match="attested clients alone"):
                inner.call(Frame(Kind.OPEN_RUN, opened)).result(5)
            for _ in range(2):
                with pytest.raises(AttestationError):
                    inner.call(Frame(Kind.EVIDENCE, Proof(proof=b"x"))).result(5)
            with pytest.raises(AttestationError, match="replayed"):
                inner.call(Frame(Kind.EVIDENCE, Proof(proof=b"x"))).result(5)
            with pytest.raises(AttestationError, match="malformed"):
                inner.call(Frame(Kind.CHALLENGE, Challenge(nonce="ab"))).result(5)
            channel.close()


def test_a_client_of_other_software_is_refused_by_the_server(world: AttestedWorld) -> None:
    strict = world.policy("laptop", measurements={"mr_td": [WRONG.hex()]})
    wish = {"policy": world.policy(), "attester": world.attester("laptop")}
    with world.serving(world.server("strict", client_policy=strict)) as served:
        said = refusal_of(world, served, **wish)
        assert "wrong-measurement" in str(said)


def test_the_adapters_at_the_server_are_sealed_with_the_owners_key(world: AttestedWorld) -> None:
    key_file = world.folder / "adapters.key"
    new_key_file(key_file)
    wish = {"policy": world.policy(), "adapter_key_file": key_file}
    run = {"run__folder": str(world.folder / "sealed-run")}
    with (
        world.serving(world.server("sealed")) as served,
        Client(world.client(served.port, wish, "bank", **run)) as client,
    ):
        client.train()
        client.export(world.folder / "exported")
    saved = sorted((world.folder / "sealed").rglob("adapter.safetensors"))
    assert saved
    vault = AesVault(bytes.fromhex(key_file.read_text()))
    assert vault.open(
        saved[0].read_bytes(), f"step {int(saved[0].parent.name[5:])} {saved[0].name}"
    )
    # Without its owner's key the server itself cannot read them.
    with (
        world.serving(world.server("sealed")) as served,
        Client(world.client(served.port, None, "bank", **run)) as client,
        pytest.raises(StorageError),
    ):
        client.export(world.folder / "exported-2")


def test_a_named_key_is_released_to_an_attested_client_alone(world: AttestedWorld) -> None:
    keys = private_folder(world.folder / "released")
    if not (keys / "part.key").exists():
        new_key_file(keys / "part.key")
    settings = world.server("keys", client_policy=world.policy("laptop"), key_folder=str(keys))
    wish = {"policy": world.policy(), "attester": world.attester("laptop")}
    with world.serving(settings) as served, Client(world.client(served.port, wish)) as client:
        assert client.attestation is not None
        with pytest.raises(AttestationError, match="no attested server"):
            client.attestation.fetch_key("part")
        client.trunk.hello()
        assert client.attestation.fetch_key("part").hex() == (keys / "part.key").read_text().strip()
        for name in ("other", "../part", ""):
            with pytest.raises(ConfigError, match="releases no key"):
                client.attestation.fetch_key(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": "/nowhere/policy.toml"}, "cannot read settings /nowhere/policy.toml"),
        ({"reattest_s": 0}, "reattest_s"),
        ({"attester": {"source": "crystal-ball"}}, "crystal-ball"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_opened(
    world: AttestedWorld, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Client(world.client(1, {"policy": world.policy(), **changes}))


def test_a_policy_without_its_root_file_is_named(world: AttestedWorld) -> None:
    policy = world.policy(roots={"simulated": "/nowhere/root.pem"})
    with pytest.raises(ConfigError, match=r"/nowhere/root\.pem"):
        Client(world.client(1, {"policy": policy}))


def test_evidence_needs_tls_on_both_sides(world: AttestedWorld) -> None:
    plain = {"address": "127.0.0.1:1", "plaintext": True}
    settings = world.client(1)
    connection = settings.connection.model_validate(plain)
    with pytest.raises(ConfigError, match="needs TLS"):
        Client(settings.model_copy(update={"connection": connection}))
    with pytest.raises(ConfigError, match="needs channels by gRPC"):
        Client(settings, connect=lambda: pytest.fail("not opened"))
    assert tls_of(world.kits.server)


def test_a_front_and_its_replica_both_attest(world: AttestedWorld) -> None:
    replicas = {"count": 1, "threads": 1}
    settings = world.server("front").model_copy(
        update={"replicas": ReplicaSettings.model_validate(replicas)}
    )
    front = TrunkFront(settings)
    front.start()
    try:
        run = {"run__folder": str(world.folder / "fronted")}
        wish = {"policy": world.policy(measurements={})}
        with Client(world.client(front.port, wish, **run)) as client:
            client.train()
            assert client.attestation is not None
            assert client.attestation.label == "SIMULATED"
        own = (world.folder / "fronted" / "audit.jsonl").read_text()
        # One verdict over the front's evidence, one over the replica's.
        assert own.count('"event":"attested"') == 2
    finally:
        front.stop(grace_s=0)


def test_members_of_a_federation_ask_for_proof_at_each_round(world: AttestedWorld) -> None:
    table = world.server("rounds").model_dump(mode="json", exclude_none=True)
    settings = parse_settings(ServerSettings, {**table, "federation": federation()}, "rounds")
    wish = {"policy": world.policy(measurements={}), "reattest_s": 3600.0}
    changes: dict[str, object] = {"train__steps": None, "federation__name": "trial"}

    def train(name: str, port: int) -> str:
        with Client(world.client(port, wish, name, **changes)) as client:
            client.train()
        return (world.folder / f"owner-{name}" / "run" / "audit.jsonl").read_text()

    with world.serving(settings) as served:
        logs = at_once([partial(train, name, served.port) for name in NAMES])
    # Two links each; in both rounds an update, in the second one a run after the first one's.
    assert served.arrived.kinds.count(Kind.SEND_UPDATE) >= 6
    assert served.arrived.kinds.count(Kind.CHALLENGE) >= 3 * 3
    assert all(log.count('"event":"attested"') >= 5 for log in logs)


def test_a_server_that_cannot_attest_says_so_before_it_listens(world: AttestedWorld) -> None:
    plain = {"address": "127.0.0.1:0", "plaintext": True}
    settings = world.server("wrong")
    listen = settings.listen.model_validate(plain)
    with pytest.raises(ConfigError, match="needs TLS"):
        TrunkServer(settings.model_copy(update={"listen": listen}))
    with pytest.raises(ConfigError, match="key_folder needs client_policy"):
        world.server("wrong", key_folder="keys")
    with pytest.raises(ConfigError, match="tsm"):
        TrunkServer(world.server("wrong-2", attester={"source": "configfs-tsm", "root": "/tmp"}))


def test_doctor_finds_a_machine_that_cannot_attest(world: AttestedWorld) -> None:
    found = {finding.name: finding for finding in check_server(world.server("looked-at"))}
    assert found["attestation"].status == "ok"
    assert "simulated evidence; clients are asked for none" in found["attestation"].text
    wrong = world.server("looked-at", client_policy="/nowhere/policy.toml")
    found = {finding.name: finding for finding in check_server(wrong)}
    assert found["attestation"].status == "fail"
    assert "/nowhere/policy.toml" in found["attestation"].text


def test_a_server_tells_its_own_level(world: AttestedWorld) -> None:
    with world.serving() as served:
        assert served.server.assurance() == "SIMULATED"
    plain = world.server("plain").model_copy(update={"tee": None})
    with world.serving(plain) as served:
        assert served.server.assurance() == "none"
