"""When a channel asks for proof: at HELLO, once the interval has passed, at each round."""

from concurrent.futures import Future
from pathlib import Path

import msgspec
import pytest
import torch

from cutlayer.client.attested_channel import AttestedChannel, Own, Terms
from cutlayer.errors import AttestationError, TransportError
from cutlayer.model.adapters import AdapterSettings
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.challenge import Challenger, Prover
from cutlayer.tee.exhibit import Side
from cutlayer.tee.key_release import Accepted
from cutlayer.tee.policy import Policy
from cutlayer.tee.synthetic_quoter import ROOT_FILE
from cutlayer.wire.attest_messages import Challenge, Key, Proof
from cutlayer.wire.codec import encode
from cutlayer.wire.federation_messages import SendUpdate, Wait
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import CloseSession, Commit, Hello, Kind, OpenRun, Welcome

SPEC: dict[str, str | int] = {"lower": 1}
SERVER_KEY = b"s" * 32
COMMIT = Frame(Kind.COMMIT, Commit(run_id="r", commit=None, save=False, step=0))
HELLO = Frame(Kind.HELLO, Hello(nonce="00" * 32, spec=SPEC, leaves={}))


class Trunk:
    """The far end: proves what it is told to prove, and remembers what it was asked."""

    def __init__(self, prover: Prover) -> None:
        self.kinds: list[Kind] = []
        self.nonces: list[str] = []
        self.key = SERVER_KEY
        self.place = ""
        self.is_closed = False
        self.is_gone = False
        self.bytes_sent = self.bytes_received = 0
        self._prover = prover

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        self.kinds.append(frame.kind)
        future: Future[Frame] = Future()
        if self.is_gone:
            future.set_exception(TransportError("gone"))
        else:
            future.set_result(self._reply(frame.header))
        return future

    def close(self) -> None:
        self.is_closed = True

    def _reply(self, header: Header) -> Frame:
        if isinstance(header, Hello):
            proof = self._proof(header.nonce)
            return Frame(
                Kind.WELCOME,
                Welcome(
                    boot_id="b", spec=SPEC, leaves={}, software="s", place=self.place, proof=proof
                ),
            )
        if isinstance(header, Challenge):
            return Frame(Kind.EVIDENCE, Proof(proof=self._proof(header.nonce)))
        if isinstance(header, Key):
            return Frame(Kind.KEY, Key(sealed=b""))
        return Frame(Kind.WAIT, Wait())

    def _proof(self, nonce: str) -> bytes:
        self.nonces.append(nonce)
        return self._prover.prove(bytes.fromhex(nonce), self.key, SPEC)


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machine") / "keys"


@pytest.fixture
def trunk(machine: Path) -> Trunk:
    prover = Prover(AttesterSettings(source="simulated", folder=machine), Side.SERVER)
    prover.attest(b"r" * 32)
    return Trunk(prover)


def channel_to(
    trunk: Trunk, machine: Path, clock: Clock, adapter_key: bytes | None = None
) -> tuple[AttestedChannel, list[Accepted | AttestationError]]:
    """A channel that asks every 60 seconds, and what it told."""
    policy = Policy.model_validate(
        {
            "name": "test",
            "platforms": ["simulated"],
            "least_assurance": "simulated",
            "roots": {"simulated": machine / ROOT_FILE},
        }
    )
    told: list[Accepted | AttestationError] = []
    own = Own(tls_key_sha256=b"c" * 32, name="clinic", prover=None, adapter_key=adapter_key)
    terms = Terms(
        challenger=Challenger(policy, Side.SERVER),
        server_key_sha256=SERVER_KEY,
        reattest_s=60.0,
        own=own,
        note=told.append,
        now_s=clock,
    )
    return AttestedChannel(trunk, terms), told


def test_nothing_leaves_before_hello_was_answered_by_a_proof(trunk: Trunk, machine: Path) -> None:
    channel, told = channel_to(trunk, machine, Clock())
    with pytest.raises(AttestationError, match="say HELLO first"):
        channel.call(COMMIT)
    assert trunk.kinds == []
    assert trunk.is_closed
    assert isinstance(told[0], AttestationError)


def test_the_nonce_of_hello_is_the_channels_own_and_new_each_time(
    trunk: Trunk, machine: Path
) -> None:
    channel, told = channel_to(trunk, machine, Clock())
    channel.call(HELLO).result()
    channel.call(HELLO).result()
    assert isinstance(HELLO.header, Hello)
    assert len({HELLO.header.nonce, *trunk.nonces}) == 3
    assert all(isinstance(one, Accepted) for one in told)


def test_proof_is_asked_again_only_once_the_interval_has_passed(
    trunk: Trunk, machine: Path
) -> None:
    clock = Clock()
    channel, _ = channel_to(trunk, machine, clock)
    channel.call(HELLO).result()
    for clock.now_s in (1.0, 60.0, 61.0, 62.0, 121.0, 122.0):
        channel.call(COMMIT).result()
    commits, asked = Kind.COMMIT, Kind.CHALLENGE
    assert trunk.kinds == [
        Kind.HELLO, commits, commits, asked, commits, commits, commits, asked, commits,
    ]  # fmt: skip


def test_each_round_begins_with_a_proof(trunk: Trunk, machine: Path) -> None:
    channel, _ = channel_to(trunk, machine, Clock())
    run = OpenRun(
        run_id="r",
        adapter=AdapterSettings().model_dump(mode="json"),
        optimizer={},
        clip_norm=None,
        wants_input_grad=True,
        seed=0,
        saved_steps=[],
    )
    in_round = Frame(Kind.OPEN_RUN, msgspec.structs.replace(run, federation="clinics"))
    update = SendUpdate(federation="clinics", round=1, attempt=1, weight=1)
    channel.call(HELLO).result()
    channel.call(in_round).result()  # HELLO was a moment ago
    channel.call(in_round).result()
    channel.call(Frame(Kind.OPEN_RUN, run)).result()
    channel.call(Frame(Kind.SEND_UPDATE, update, {"x": encode(torch.ones(1, 2))})).result()
    channel.call(Frame(Kind.SEND_UPDATE, update)).result()  # the same again, after WAIT
    assert trunk.kinds == [
        Kind.HELLO,
        Kind.OPEN_RUN,
        Kind.CHALLENGE,
        Kind.OPEN_RUN,
        Kind.OPEN_RUN,
        Kind.CHALLENGE,
        Kind.SEND_UPDATE,
        Kind.SEND_UPDATE,
    ]


def test_a_place_that_changed_its_key_gets_nothing_more(trunk: Trunk, machine: Path) -> None:
    clock = Clock()
    channel, told = channel_to(trunk, machine, clock)
    channel.call(HELLO).result()
    trunk.key, clock.now_s = b"other" * 6 + b"xx", 61.0
    with pytest.raises(AttestationError) as caught:
        channel.call(COMMIT)
    assert caught.value.refusal == "wrong-binding"
    assert trunk.kinds == [Kind.HELLO, Kind.CHALLENGE]
    assert trunk.is_closed
    with pytest.raises(AttestationError):
        channel.call(COMMIT)
    assert told[-2] is caught.value


def test_a_lost_connection_while_asking_is_no_refusal(trunk: Trunk, machine: Path) -> None:
    clock = Clock()
    channel, told = channel_to(trunk, machine, clock)
    channel.call(HELLO).result()
    trunk.is_gone, clock.now_s = True, 61.0
    with pytest.raises(TransportError):
        channel.call(COMMIT)
    assert len(told) == 1
    assert not trunk.is_closed


def test_giving_back_what_was_lent_asks_for_nothing(trunk: Trunk, machine: Path) -> None:
    clock, close = Clock(), Frame(Kind.CLOSE_SESSION, CloseSession(session_id="s"))
    channel, _ = channel_to(trunk, machine, clock)
    with pytest.raises(TransportError):
        channel.call(close)
    channel.call(HELLO).result()
    clock.now_s = 999.0
    channel.call(close).result()
    assert trunk.kinds == [Kind.HELLO, Kind.CLOSE_SESSION]


def test_the_adapter_key_goes_to_the_place_of_the_runs_alone(trunk: Trunk, machine: Path) -> None:
    channel, _ = channel_to(trunk, machine, Clock(), adapter_key=b"a" * 32)
    trunk.place = "replica.example.org:7500"
    channel.call(HELLO).result()
    assert trunk.kinds == [Kind.HELLO]
    trunk.place = ""
    channel.call(HELLO).result()
    assert trunk.kinds == [Kind.HELLO, Kind.HELLO, Kind.KEY]
    assert "a" * 32 not in repr(channel._terms)
