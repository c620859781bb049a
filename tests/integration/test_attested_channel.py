"""From challenge to training step over simulated evidence; every refusal before any tensor."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from cutlayer import Client
from cutlayer.cli.link import check_reachable
from cutlayer.errors import AttestationError, PermissionRefused
from cutlayer.identity.keys import new_key
from cutlayer.identity.provision import local
from cutlayer.model.folder import resolve_model
from cutlayer.storage.files import private_folder
from cutlayer.tee.binding import Binding
from cutlayer.tee.exhibit import MAX_PROOF_BYTES, Exhibit
from cutlayer.tee.ra_tls import key_digest, key_pem, make_certificate
from cutlayer.tee.refusal import Refusal
from cutlayer.tee.synthetic_quoter import Pretence
from cutlayer.tee.verifier import utc_now
from cutlayer.wire.attest_messages import Proof
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Hello, Kind, Welcome
from tests.attested_worlds import (
    Answer,
    AttestedWorld,
    Served,
    attestation_in,
    proof_of,
    refusal_of,
)

WRONG = bytes(48)
OLD = timedelta(days=40)
Certificate = Callable[[AttestedWorld], Callable[[], tuple[bytes, bytes]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AttestedWorld:
    return AttestedWorld.make(tmp_path_factory.mktemp("attested"))


def test_an_attested_trunk_trains_and_the_level_is_told(world: AttestedWorld) -> None:
    with world.serving() as served, Client(world.client(served.port)) as client:
        progress = client.train()
        assert progress.step == 2
        assert client.attestation is not None
        assert client.attestation.line.startswith("attestation: SIMULATED, by policy server")
    assert served.arrived.kinds[0] is Kind.HELLO
    assert served.arrived.num_tensors > 0
    log = (world.folder / "owner-clinic" / "run" / "audit.jsonl").read_text()
    assert '"event":"attested"' in log
    assert '"assurance":"SIMULATED"' in log


def test_doctor_tells_the_level(world: AttestedWorld) -> None:
    with world.serving() as served:
        settings = world.client(served.port)
        said = check_reachable(settings, resolve_model(settings.model.path))
        assert "attestation: SIMULATED" in said


@dataclass(frozen=True)
class AtTheDoor:
    """A certificate that must not be spoken to."""

    certificate: Certificate
    refusal: Refusal


def _stolen(world: AttestedWorld) -> Callable[[], tuple[bytes, bytes]]:
    """The honest server's evidence in a certificate of the thief's own key."""
    with world.serving() as served:
        _, pem = attestation_in(served.server).own_certificate()
    (evidence,) = (
        extension.value
        for extension in x509.load_pem_x509_certificate(pem).extensions
        if extension.oid.dotted_string == "2.23.133.5.4.9"
    )
    assert isinstance(evidence, x509.UnrecognizedExtension)
    return _carrying(world, evidence.value)


def _carrying(world: AttestedWorld, value: bytes) -> Callable[[], tuple[bytes, bytes]]:
    """A certificate whose evidence is these bytes."""
    shown = world.certificate()()
    key = load_pem_private_key(shown[0], None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    found = x509.load_pem_x509_certificate(shown[1])
    builder = x509.CertificateBuilder(
        found.issuer, found.subject, key.public_key(), found.serial_number
    )
    builder = builder.not_valid_before(found.not_valid_before_utc)
    builder = builder.not_valid_after(found.not_valid_after_utc)
    for extension in found.extensions:
        kept = extension.value
        if extension.oid.dotted_string == "2.23.133.5.4.9":
            kept = x509.UnrecognizedExtension(extension.oid, value)
        builder = builder.add_extension(kept, extension.critical)
    made = builder.sign(key, found.signature_hash_algorithm)
    pem = made.public_bytes(Encoding.PEM)
    return lambda: (shown[0], pem)


DOOR = {
    "stolen evidence": AtTheDoor(_stolen, Refusal.WRONG_BINDING),
    "other software": AtTheDoor(
        lambda world: world.certificate(mr_td=WRONG), Refusal.WRONG_MEASUREMENT
    ),
    "debug": AtTheDoor(
        lambda world: world.certificate(pretence=Pretence(is_debug=True)), Refusal.DEBUG
    ),
    "another vendor": AtTheDoor(
        lambda world: world.certificate(machine="forger"), Refusal.WRONG_ROOT
    ),
    "old collateral": AtTheDoor(
        lambda world: world.certificate(pretence=Pretence(collateral_age=OLD)), Refusal.EXPIRED
    ),
    "stale certificate": AtTheDoor(
        lambda world: world.certificate(at=utc_now() - timedelta(hours=25)), Refusal.EXPIRED
    ),
    "clock ahead": AtTheDoor(
        lambda world: world.certificate(at=utc_now() + timedelta(hours=1)), Refusal.NOT_YET_VALID
    ),
    "no CBOR": AtTheDoor(lambda world: _carrying(world, b"\x00rubbish"), Refusal.MALFORMED),
    "no evidence in it": AtTheDoor(
        lambda world: _carrying(world, bytes.fromhex("d9ea6043") + b"abc"), Refusal.MALFORMED
    ),
}


@pytest.mark.parametrize("name", DOOR)
def test_a_certificate_that_proves_nothing_is_sent_no_byte(world: AttestedWorld, name: str) -> None:
    case = DOOR[name]
    with world.serving(certificate=case.certificate(world)) as served:
        assert refusal_of(world, served).refusal == case.refusal
        assert served.arrived.kinds == []


def test_a_server_without_evidence_is_sent_no_byte(world: AttestedWorld) -> None:
    plain = world.server("plain").model_copy(update={"tee": None})
    with world.serving(plain) as served:
        assert refusal_of(world, served).refusal == Refusal.NO_EVIDENCE
        assert served.arrived.kinds == []


def test_where_evidence_is_not_required_a_server_without_any_is_used_and_told_so(
    world: AttestedWorld,
) -> None:
    plain = world.server("plain").model_copy(update={"tee": None})
    wish = {"policy": world.policy(), "required": False}
    with world.serving(plain) as served, Client(world.client(served.port, wish)) as client:
        client.trunk.hello()
        assert client.attestation is not None
        assert client.attestation.line == "attestation: none"
    forged = world.certificate(mr_td=WRONG)
    with world.serving(certificate=forged) as served:
        assert refusal_of(world, served, **wish).refusal == Refusal.WRONG_MEASUREMENT


def test_a_place_that_swaps_its_key_after_the_verdict_is_sent_no_frame(
    world: AttestedWorld,
) -> None:
    with world.serving() as honest:
        shown = attestation_in(honest.server).own_certificate()
    forged, asked = world.certificate(mr_td=WRONG)(), []

    def swap() -> tuple[bytes, bytes]:
        # The listener asks once before it listens; then each verdict's handshake comes first.
        asked.append(0)
        return shown if len(asked) <= 2 else forged

    with (
        world.serving(certificate=swap) as served,
        Client(world.client(served.port)) as client,
        pytest.raises((PermissionRefused, AttestationError)),
    ):
        client.train()
    assert served.arrived.kinds == []


def test_an_attested_place_that_the_authority_does_not_know_is_sent_no_byte(
    world: AttestedWorld, tmp_path: Path
) -> None:
    key = new_key()
    digest = key_digest(key.public_key())
    binding = Binding(tls_key_sha256=digest, nonce=b"", spec_digest=b"")
    bare = make_certificate(key, world.evidence(binding), utc_now())
    with world.serving(certificate=lambda: (key_pem(key), bare)) as served:
        said = _permission_refused(world, served)
        assert "does not say which server" in said
    stranger = AttestedWorld(
        world.folder, world.model, local(private_folder(tmp_path / "kits"), names=("x",))
    )
    with world.serving(certificate=stranger.certificate()) as served:
        assert "refuses the attested server's operator" in _permission_refused(world, served)


def _permission_refused(world: AttestedWorld, served: Served) -> str:
    with (
        Client(world.client(served.port)) as client,
        pytest.raises(PermissionRefused) as caught,
    ):
        client.train()
    assert served.arrived.kinds == []
    return str(caught.value)


Forge = Callable[[AttestedWorld, Served, Frame, bytes], bytes]
"""World, server, HELLO and the honest proof, to another one."""


def _by(**pretended: object) -> Forge:
    return lambda world, served, call, proof: proof_of(world, served.server, call, **pretended)


def _for_other_spec(world: AttestedWorld, served: Served, call: Frame, proof: bytes) -> bytes:
    assert isinstance(call.header, Hello)
    other = msgspec.structs.replace(call.header, spec={**call.header.spec, "lower": 2})
    return proof_of(world, served.server, replace(call, header=other))


def _other_sealing_key(world: AttestedWorld, served: Served, call: Frame, proof: bytes) -> bytes:
    exhibit = Exhibit.unpack(proof)
    return msgspec.structs.replace(exhibit, sealing_key=b"k" * 32).pack()


HELLOS: dict[str, tuple[Forge, Refusal]] = {
    "nothing": (lambda *_: b"", Refusal.NO_EVIDENCE),
    "rubbish": (lambda *_: b"\xc1rubbish", Refusal.MALFORMED),
    "cut short": (lambda world, served, call, proof: proof[:-9], Refusal.MALFORMED),
    "too large": (lambda *_: bytes(MAX_PROOF_BYTES + 1), Refusal.MALFORMED),
    "another nonce": (_by(nonce=b"n" * 32), Refusal.WRONG_BINDING),
    "another spec": (_for_other_spec, Refusal.WRONG_BINDING),
    "another key to seal to": (_other_sealing_key, Refusal.WRONG_BINDING),
    "other software": (_by(mr_td=WRONG), Refusal.WRONG_MEASUREMENT),
    "debug": (_by(pretence=Pretence(is_debug=True)), Refusal.DEBUG),
    "another machine": (_by(machine="forger"), Refusal.WRONG_ROOT),
}


@pytest.mark.parametrize("name", HELLOS)
def test_a_server_whose_answer_to_hello_proves_nothing_is_sent_no_tensor(
    world: AttestedWorld, name: str
) -> None:
    forge, refusal = HELLOS[name]
    holder: list[Served] = []

    def lie(call: Frame, reply: Frame) -> Frame:
        if not isinstance(reply.header, Welcome):
            return reply
        proof = forge(world, holder[0], call, reply.header.proof)
        return replace(reply, header=msgspec.structs.replace(reply.header, proof=proof))

    with world.serving(answer=lie) as served:
        holder.append(served)
        assert refusal_of(world, served).refusal == refusal
        assert served.arrived.kinds == [Kind.HELLO]


def _repeating(kinds: set[Kind]) -> Answer:
    """Answers these calls with the first proof that was ever shown."""
    first: list[bytes] = []

    def answer(call: Frame, reply: Frame) -> Frame:
        header = reply.header
        if isinstance(header, Welcome | Proof):
            first.append(header.proof)
            if call.kind in kinds:
                return replace(reply, header=msgspec.structs.replace(header, proof=first[0]))
        return reply

    return answer


def test_a_second_hello_is_not_answered_by_the_evidence_of_the_first(world: AttestedWorld) -> None:
    with (
        world.serving(answer=_repeating({Kind.HELLO})) as served,
        Client(world.client(served.port)) as client,
    ):
        client.trunk.hello()
        with pytest.raises(AttestationError) as caught:
            client.trunk.hello()
        assert caught.value.refusal == Refusal.REPLAYED
        assert served.arrived.num_tensors == 0


def test_a_trunk_that_repeats_old_evidence_later_gets_no_further_tensor(
    world: AttestedWorld,
) -> None:
    wish = {"policy": world.policy(), "reattest_s": 1e-6}
    with (
        world.serving(answer=_repeating({Kind.CHALLENGE})) as served,
        Client(world.client(served.port, wish)) as client,
        pytest.raises(AttestationError) as caught,
    ):
        client.train()
    assert caught.value.refusal == Refusal.REPLAYED
    assert served.arrived.kinds == [Kind.HELLO, Kind.CHALLENGE]


def test_the_trunk_proves_itself_anew_before_each_call_once_the_interval_has_passed(
    world: AttestedWorld,
) -> None:
    wish = {"policy": world.policy(), "reattest_s": 1e-6}
    with world.serving() as served, Client(world.client(served.port, wish)) as client:
        client.train()
    kinds = served.arrived.kinds
    for before, kind in pairwise(kinds):
        if kind is Kind.FORWARD:
            assert before is Kind.CHALLENGE


def test_a_restarted_trunk_attests_again(world: AttestedWorld) -> None:
    with world.serving() as served, Client(world.client(served.port)) as client:
        client.trunk.hello()
        client.trunk._link._channel.close()  # type: ignore[union-attr]
        client.train()
        assert served.arrived.kinds.count(Kind.HELLO) == 2
