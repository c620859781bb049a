"""What a server's connection answers before and after the client has proved itself."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cutlayer.errors import AttestationError, ConfigError, ProtocolError
from cutlayer.identity.provision import local, member_files
from cutlayer.server import attestation
from cutlayer.server.attestation import PeerAttestation, ServerAttestation
from cutlayer.server.audit import Audit
from cutlayer.server.owner_vaults import OwnerVaults, vault_of
from cutlayer.server.tee_settings import ServerTeeSettings
from cutlayer.storage.audit_log import AuditLog
from cutlayer.storage.files import private_folder
from cutlayer.storage.vault import AesVault, NoVault
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.challenge import Prover
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.exhibit import Exhibit, Side
from cutlayer.tee.key_release import Accepted, adapter_job, release
from cutlayer.tee.synthetic_quoter import ROOT_FILE
from cutlayer.tee.verifier import Trust, utc_now
from cutlayer.tee.verify import verify
from cutlayer.wire.attest_messages import Challenge, Key, KeyRequest, Proof
from cutlayer.wire.channel import Peer
from cutlayer.wire.codec import encode
from cutlayer.wire.endpoints import ListenSettings, TlsFiles
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import CloseSession, Commit, Hello, Kind, Welcome
from tests.unit.tee.evidence_samples import sample

SPEC: dict[str, str | int] = {"lower": 1}
CLIENT_KEY = b"c" * 32
PEER = Peer(name="clinic", roles=frozenset(), serial=1, address="test", tls_key_sha256=CLIENT_KEY)
HELLO = Hello(nonce="ab" * 32, spec=SPEC, leaves={})
WELCOME = Welcome(boot_id="b", spec=SPEC, leaves={}, software="s")
COMMIT = Frame(Kind.COMMIT, Commit(run_id="r", commit=None, save=False, step=0))
OWNERS_KEY = bytes(range(32))


class World:
    """A server that wants evidence, and a client that has some."""

    def __init__(self, folder: Path) -> None:
        kits = local(private_folder(folder / "kits"))
        files = member_files(kits.server)
        self.machine = folder / "machine"
        attester = AttesterSettings(source="simulated", folder=self.machine)
        self.client = Prover(attester, Side.CLIENT)
        self.client.attest(b"r" * 32)
        policy = folder / "policy.toml"
        policy.write_text(
            'name = "clients"\nplatforms = ["simulated"]\nleast_assurance = "simulated"\n'
            f'roots = {{ simulated = "{self.machine / ROOT_FILE}" }}\n'
        )
        self.settings = ServerTeeSettings(
            attester=attester, client_policy=policy, client_reattest_s=60.0
        )
        tls = TlsFiles(certificate=files.certificate, key=files.key, authority=files.authority)
        self.listen = ListenSettings(address="127.0.0.1:0", tls=tls)
        self.audit = Audit(AuditLog(private_folder(folder / "state") / "audit.jsonl"))
        self.vaults = OwnerVaults(NoVault())
        self.server = ServerAttestation(self.settings, self.listen, self.audit, self.vaults)
        self.now_s = 0.0

    def connected(self, server: ServerAttestation | None = None) -> tuple[PeerAttestation, Welcome]:
        """A connection after HELLO."""
        connection = PeerAttestation(server or self.server, PEER, lambda: self.now_s)
        return connection, connection.welcome(HELLO, WELCOME)

    def proof(self, nonce: str) -> Frame:
        """The client's."""
        return Frame(
            Kind.EVIDENCE, Proof(proof=self.client.prove(bytes.fromhex(nonce), CLIENT_KEY, SPEC))
        )

    def accepted(self) -> PeerAttestation:
        """A connection whose client has proved itself."""
        connection, welcome = self.connected()
        connection.answer(self.proof(welcome.challenge))
        return connection


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("attestation"))


def test_calls_are_taken_once_the_client_has_proved_itself(world: World) -> None:
    connection, welcome = world.connected()
    with pytest.raises(AttestationError) as caught:
        connection.answer(COMMIT)
    assert caught.value.refusal == "no-evidence"
    answered = connection.answer(world.proof(welcome.challenge))
    assert answered is not None
    assert isinstance(answered.header, Challenge)
    assert answered.header.nonce not in ("", welcome.challenge)
    assert connection.answer(COMMIT) is None


def test_a_clients_evidence_counts_for_a_while_and_is_renewed_by_the_next_nonce(
    world: World,
) -> None:
    connection, welcome = world.connected()
    answered = connection.answer(world.proof(welcome.challenge))
    assert answered is not None
    assert isinstance(answered.header, Challenge)
    world.now_s += 61.0
    with pytest.raises(AttestationError, match=r"stale.*tee\.reattest_s") as caught:
        connection.answer(COMMIT)
    assert caught.value.refusal == "stale"
    close = Frame(Kind.CLOSE_SESSION, CloseSession(session_id="s"))
    assert connection.answer(close) is None
    connection.answer(world.proof(answered.header.nonce))
    assert connection.answer(COMMIT) is None


def test_evidence_that_was_accepted_once_is_a_replay(world: World) -> None:
    connection, welcome = world.connected()
    shown = world.proof(welcome.challenge)
    connection.answer(shown)
    with pytest.raises(AttestationError) as caught:
        connection.answer(shown)
    assert caught.value.refusal == "replayed"
    with pytest.raises(AttestationError):
        connection.answer(COMMIT)


def test_another_clients_evidence_does_not_fit_this_ones_key(world: World) -> None:
    connection, welcome = world.connected()
    other = world.client.prove(bytes.fromhex(welcome.challenge), b"o" * 32, SPEC)
    with pytest.raises(AttestationError) as caught:
        connection.answer(Frame(Kind.EVIDENCE, Proof(proof=other)))
    assert caught.value.refusal == "wrong-binding"


def test_a_new_hello_begins_anew(world: World) -> None:
    connection = world.accepted()
    connection.welcome(HELLO, WELCOME)
    with pytest.raises(AttestationError, match="attested clients alone"):
        connection.answer(COMMIT)


def test_a_challenge_needs_a_nonce_and_carries_no_tensor(world: World) -> None:
    connection = world.accepted()
    with pytest.raises(AttestationError, match="32 bytes in hex"):
        connection.answer(Frame(Kind.CHALLENGE, Challenge(nonce="")))
    tensors = {"x": encode(torch.ones(1, 2))}
    with pytest.raises(ProtocolError, match="carries tensors"):
        connection.answer(Frame(Kind.CHALLENGE, Challenge(nonce="ab" * 32), tensors))
    answered = connection.answer(Frame(Kind.CHALLENGE, Challenge(nonce="ab" * 32)))
    assert answered is not None
    assert answered.kind is Kind.EVIDENCE


def test_a_server_without_the_section_proves_nothing_and_takes_calls(world: World) -> None:
    connection = PeerAttestation(None, PEER, lambda: 0.0)
    assert connection.welcome(HELLO, WELCOME) is WELCOME
    assert connection.answer(COMMIT) is None
    for header in (Challenge(nonce="ab" * 32), Proof(proof=b""), KeyRequest(name="x")):
        kind = {Challenge: Kind.CHALLENGE, Proof: Kind.EVIDENCE}.get(type(header), Kind.KEY_REQUEST)
        with pytest.raises(AttestationError, match=r"no \[tee\] section"):
            connection.answer(Frame(kind, header))


def _key_for(world: World, connection: PeerAttestation, job: str) -> Frame:
    answered = connection.answer(Frame(Kind.CHALLENGE, Challenge(nonce="cd" * 32)))
    assert answered is not None
    assert isinstance(answered.header, Proof)
    exhibit = Exhibit.unpack(answered.header.proof)
    policy = world.server.challenger
    assert policy is not None
    result = verify(exhibit.evidence, policy.policy, utc_now(), None)
    place = Accepted(result=result, side=Side.SERVER, sealing_key=exhibit.sealing_key)
    sealed = release(OWNERS_KEY, place, job, utc_now() + timedelta(minutes=1))
    return Frame(Kind.KEY, Key(sealed=sealed))


def test_an_owners_key_seals_its_own_steps_alone(world: World) -> None:
    connection = world.accepted()
    assert vault_of(world.vaults, "clinic").seal(b"x", "c") == b"x"
    connection.answer(_key_for(world, connection, adapter_job("clinic")))
    sealed = vault_of(world.vaults, "clinic").seal(b"x", "c")
    assert AesVault(OWNERS_KEY).open(sealed, "c") == b"x"
    assert vault_of(world.vaults, "bank").seal(b"x", "c") == b"x"
    assert world.vaults.seal(b"x", "c") == b"x"


def test_a_key_for_another_owner_is_not_taken(world: World) -> None:
    connection = world.accepted()
    with pytest.raises(AttestationError, match="the key is for 'adapters of bank'"):
        connection.answer(_key_for(world, connection, adapter_job("bank")))


def test_a_front_takes_no_keys(world: World) -> None:
    front = ServerAttestation(world.settings, world.listen, world.audit)
    connection, welcome = world.connected(front)
    connection.answer(world.proof(welcome.challenge))
    with pytest.raises(AttestationError, match="give keys to replicas"):
        connection.answer(Frame(Kind.KEY, Key(sealed=b"")))


def test_an_attester_that_fails_later_is_named_without_its_reasons(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = world.accepted()

    def fail(report_data: bytes) -> Evidence:
        raise ConfigError("/secret/path is away")

    monkeypatch.setattr(world.server.prover, "attest", fail)
    with pytest.raises(AttestationError, match="cannot attest now") as caught:
        connection.answer(Frame(Kind.CHALLENGE, Challenge(nonce="ab" * 32)))
    assert "secret" not in str(caught.value)


@pytest.mark.system
def test_a_debug_machine_is_not_called_hardware(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.server.door, "evidence", sample("published sev-snp").evidence)
    assert world.server.label == "debug, worth nothing"


def test_what_evidence_is_worth_is_computed_once_for_it_and_again_when_it_may_have_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Evidence] = []

    def claims_of(evidence: Evidence, trust: Trust) -> Claims:
        looked.append(evidence)
        return really(evidence, trust)

    really, now = attestation.claims_of, utc_now()
    monkeypatch.setattr(attestation, "claims_of", claims_of)
    monkeypatch.setattr(world.server.door, "now", lambda: now)
    first, other = (Evidence(platform=Platform.TDX, body=body) for body in (b"1", b"2"))
    monkeypatch.setattr(world.server.door, "evidence", first)
    labels = {world.server.label for _ in range(3)}
    assert labels == {"unverified (malformed)"}
    assert looked == [first]
    monkeypatch.setattr(world.server.door, "evidence", other)
    assert world.server.label in labels
    assert looked == [first, other]
    now += timedelta(minutes=11)
    assert world.server.label in labels
    assert looked == [first, other, other]
