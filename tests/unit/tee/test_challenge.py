"""Nonces count once; a proof counts for one connection, one spec and one side."""

from pathlib import Path

import msgspec
import pytest

from cutlayer.errors import AttestationError, ConfigError
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.binding import Binding
from cutlayer.tee.challenge import Challenger, Prover, read_nonce
from cutlayer.tee.evidence import Platform
from cutlayer.tee.exhibit import Exhibit, Side, pack_evidence, session_digest, unpack_evidence
from cutlayer.tee.policy import Policy
from cutlayer.tee.synthetic_quoter import ROOT_FILE
from tests.unit.tee.authorities import AT
from tests.unit.tee.azure_worlds import AzureVm

SPEC: dict[str, str | int] = {"lower": 1, "model_type": "llama"}
KEY = b"k" * 32


@pytest.fixture(scope="module")
def prover(tmp_path_factory: pytest.TempPathFactory) -> Prover:
    folder = tmp_path_factory.mktemp("machine") / "keys"
    made = Prover(AttesterSettings(source="simulated", folder=folder), Side.SERVER)
    made.attest(b"r" * 32)
    return made


@pytest.fixture
def challenger(prover: Prover) -> Challenger:
    return Challenger(_policy(prover), Side.SERVER)


def _policy(prover: Prover) -> Policy:
    folder = prover._settings.folder
    assert isinstance(folder, Path)
    return Policy.model_validate(
        {
            "name": "test",
            "platforms": ["simulated"],
            "least_assurance": "simulated",
            "roots": {"simulated": folder / ROOT_FILE},
        }
    )


def _refusal(challenger: Challenger, proof: bytes, nonce: bytes, key: bytes = KEY) -> str:
    with pytest.raises(AttestationError) as caught:
        challenger.judge(proof, nonce, key, SPEC)
    return caught.value.refusal


def test_a_fresh_proof_is_accepted_with_its_key(challenger: Challenger, prover: Prover) -> None:
    nonce = challenger.draw()
    accepted = challenger.judge(prover.prove(nonce, KEY, SPEC), nonce, KEY, SPEC)
    assert accepted.sealing_key == prover.sealing_key.public
    assert accepted.side is Side.SERVER
    assert accepted.result.at.tzinfo is not None


def test_a_nonce_counts_once_whatever_came_of_it(challenger: Challenger, prover: Prover) -> None:
    nonce = challenger.draw()
    assert _refusal(challenger, b"rubbish", nonce) == "malformed"
    assert _refusal(challenger, prover.prove(nonce, KEY, SPEC), nonce) == "replayed"
    never_drawn = b"n" * 32
    assert _refusal(challenger, prover.prove(never_drawn, KEY, SPEC), never_drawn) == "replayed"


def test_a_proof_that_was_shown_before_is_a_replay(challenger: Challenger, prover: Prover) -> None:
    nonce = challenger.draw()
    proof = prover.prove(nonce, KEY, SPEC)
    challenger.judge(proof, nonce, KEY, SPEC)
    assert _refusal(challenger, proof, challenger.draw()) == "replayed"


def test_a_machine_whose_report_is_made_at_boot_may_prove_itself_again(tmp_path: Path) -> None:
    # Azure: the body is the same until the next boot; what is fresh is the quote beside it.
    vm, root = AzureVm(), tmp_path / "ark.pem"
    root.write_bytes(vm.chip.ark.pem)
    policy = Policy(
        name="azure",
        platforms=[Platform.AZURE],
        least_assurance="simulated",
        roots={Platform.AZURE: root},
    )
    challenger = Challenger(policy, Side.SERVER, lambda: AT)
    at_boot = vm.report(vm.runtime())
    for _ in range(2):
        nonce = challenger.draw()
        digest = session_digest(SPEC, Side.SERVER, bytes(32))
        binding = Binding(tls_key_sha256=KEY, nonce=nonce, spec_digest=digest)
        evidence = msgspec.structs.replace(vm.evidence(binding.report_data()), body=at_boot)
        proof = Exhibit(evidence=evidence, sealing_key=bytes(32)).pack()
        assert challenger.judge(proof, nonce, KEY, SPEC).result.assurance.label == "SIMULATED"
    assert _refusal(challenger, proof, challenger.draw()) == "replayed"


def test_a_proof_for_another_key_nonce_spec_or_side_is_bound_wrongly(
    challenger: Challenger, prover: Prover
) -> None:
    nonce = challenger.draw()
    assert _refusal(challenger, prover.prove(nonce, b"o" * 32, SPEC), nonce) == "wrong-binding"
    nonce = challenger.draw()
    assert _refusal(challenger, prover.prove(b"o" * 32, KEY, SPEC), nonce) == "wrong-binding"
    nonce = challenger.draw()
    other = prover.prove(nonce, KEY, {**SPEC, "lower": 2})
    assert _refusal(challenger, other, nonce) == "wrong-binding"
    of_clients = Challenger(_policy(prover), Side.CLIENT)
    nonce = of_clients.draw()
    assert _refusal(of_clients, prover.prove(nonce, KEY, SPEC), nonce) == "wrong-binding"


def test_a_sealing_key_that_was_exchanged_is_bound_wrongly(
    challenger: Challenger, prover: Prover
) -> None:
    nonce = challenger.draw()
    exhibit = Exhibit.unpack(prover.prove(nonce, KEY, SPEC))
    forged = msgspec.structs.replace(exhibit, sealing_key=b"t" * 32).pack()
    assert _refusal(challenger, forged, nonce) == "wrong-binding"


def test_every_cut_and_flip_of_a_proof_is_refused_with_a_name(
    challenger: Challenger, prover: Prover
) -> None:
    nonce = challenger.draw()
    proof = prover.prove(nonce, KEY, SPEC)
    for index in range(0, len(proof), 211):
        assert _refusal(challenger, proof[:index], challenger.draw())
        flipped = proof[:index] + bytes([proof[index] ^ 0x11]) + proof[index + 1 :]
        assert _refusal(challenger, flipped, challenger.draw())


def test_one_connection_does_not_push_out_anothers_nonce(
    challenger: Challenger, prover: Prover
) -> None:
    here, there = challenger.for_connection(), challenger.for_connection()
    nonce = here.draw()
    for _ in range(5000):
        there.draw()
    proof = prover.prove(nonce, KEY, SPEC)
    here.judge(proof, nonce, KEY, SPEC)
    with pytest.raises(AttestationError) as caught:
        there.judge(proof, there.draw(), KEY, SPEC)
    assert caught.value.refusal == "replayed"


@pytest.mark.parametrize("text", ["", "zz" * 32, "00" * 31, "00" * 33, "00" * 10_000])
def test_a_nonce_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(AttestationError, match="32 bytes in hex"):
        read_nonce(text)


def test_a_source_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="simulated"):
        Prover(AttesterSettings(source="crystal-ball"), Side.CLIENT)


def test_packed_evidence_comes_back(prover: Prover) -> None:
    evidence = prover.attest(b"r" * 32)
    assert unpack_evidence(pack_evidence(evidence)) == evidence
    with pytest.raises(AttestationError, match="the certificate's evidence"):
        unpack_evidence(b"\xc1")


def test_sessions_differ_in_every_part_of_their_digest() -> None:
    digests = {
        session_digest(SPEC, Side.SERVER, KEY),
        session_digest(SPEC, Side.CLIENT, KEY),
        session_digest(SPEC, Side.SERVER, b"o" * 32),
        session_digest({**SPEC, "lower": 2}, Side.SERVER, KEY),
        session_digest({**SPEC, "lower": "1"}, Side.SERVER, KEY),
    }
    assert len(digests) == 5
