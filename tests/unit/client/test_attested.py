"""What an owner is told that evidence was worth, over all connections of a run."""

from pathlib import Path

from cutlayer.client.attested import attestation_of, level
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Platform
from cutlayer.tee.exhibit import Side
from cutlayer.tee.key_release import Accepted
from cutlayer.tee.verifier import utc_now
from cutlayer.tee.verify import AttestationResult
from tests.attested_worlds import AttestedWorld


def _accepted(assurance: Assurance) -> Accepted:
    claims = Claims(
        platform=Platform.TDX,
        assurance=assurance,
        measurements={},
        report_data=b"",
        is_debug=False,
        tcb_status="UpToDate",
    )
    result = AttestationResult(claims=claims, policy="p", policy_digest="", at=utc_now())
    return Accepted(result=result, side=Side.SERVER, sealing_key=bytes(32))


def test_a_better_server_later_raises_no_result(tmp_path: Path) -> None:
    world = AttestedWorld.make(tmp_path)
    plain = world.server("plain").model_copy(update={"tee": None})
    with world.serving(plain) as served:
        settings = world.client(served.port, {"required": False})
        attestation = attestation_of(settings)
        assert attestation is not None
        assert level(attestation) == "none"
        for worth in (Assurance.HARDWARE_TEE_GPU, Assurance.HARDWARE_TEE):
            attestation._told(_accepted(worth))
            assert level(attestation) == worth.label
        attestation._told(_accepted(Assurance.HARDWARE_TEE_GPU))
        assert attestation.line.startswith("attestation: hardware-tee,")
        # A server that shows no evidence, which these settings allow: it may be given tensors.
        attestation.open(settings.connection).close()
    attestation._told(_accepted(Assurance.HARDWARE_TEE))
    assert (level(attestation), attestation.line) == ("none", "attestation: none")
