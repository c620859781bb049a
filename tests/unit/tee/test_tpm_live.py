"""A TPM 2.0 in software, end to end: quote, activation, sealing, and what each refuses."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

import cutlayer.tee.attesters.tpm  # noqa: F401  (registers it)
from cutlayer.errors import AttestationError, ConfigError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence
from cutlayer.tee.policy import Policy
from cutlayer.tee.tpm_activation import begin_activation, finish_activation, request_activation
from cutlayer.tee.tpm_attest import parse_signature, verify_quote
from cutlayer.tee.tpm_device import TpmDevice
from cutlayer.tee.tpm_keys import parse_public
from cutlayer.tee.tpm_sealing import read_sealed, seal, unseal, write_sealed
from cutlayer.tee.tpm_trust import ATTESTATION_USAGE, ENDORSEMENT_USAGE, key_pem
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of, verify
from tests.tpm_worlds import extend, maker, quote_with, software_tpm

pytestmark = pytest.mark.system

NOW = datetime(2026, 11, 21, tzinfo=UTC)
NONCE = bytes(range(32))


@pytest.fixture
def device() -> Iterator[TpmDevice]:
    with software_tpm() as found:
        yield found


@pytest.fixture
def other_device() -> Iterator[TpmDevice]:
    with software_tpm() as found:
        yield found


def _evidence(device: TpmDevice, monkeypatch: pytest.MonkeyPatch, nonce: bytes) -> Evidence:
    monkeypatch.setenv("TPM2TOOLS_TCTI", device.tcti)
    return ATTESTERS.get("tpm").attest(AttesterSettings(source="tpm"), nonce)


def _policy(folder: Path, roots: bytes, pcr4: str) -> Policy:
    path = folder / "tpm.pem"
    path.write_bytes(roots)
    return Policy(
        name="a measured machine",
        platforms=["tpm"],
        least_assurance="measured-boot",
        measurements={"pcr4": [pcr4]},
        roots={"tpm": path},
    )


def _activate(device: TpmDevice, other: TpmDevice | None = None) -> bytes:
    """The owner knows the endorsement key; `other` answers in the device's place."""
    request = request_activation(device)
    known = key_pem(parse_public(request.ek).key)
    challenge = begin_activation(request, known, NOW)
    answer = (other or device).activate(challenge.credential)
    return finish_activation(challenge, answer)


def test_activated_key_quotes_what_was_booted(
    device: TpmDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(tmp_path, _activate(device), "00" * 32)
    result = verify(_evidence(device, monkeypatch, NONCE), policy, NOW, NONCE)
    assert result.assurance is Assurance.MEASURED_BOOT
    assert result.claims.report_data == NONCE
    assert {f"pcr{index}" for index in range(16)} <= set(result.claims.measurements)


@pytest.mark.parametrize("scheme", ["rsa2048:rsassa", "rsa2048:rsapss", "ecc384:ecdsa"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha384"])
def test_quote_of_any_scheme_and_bank_verifies(
    device: TpmDevice, tmp_path: Path, scheme: str, algorithm: str
) -> None:
    extend(device, 7)
    quote = quote_with(device, tmp_path, f"{scheme}-{algorithm}:null", algorithm)
    key = parse_public((tmp_path / "ak.pub").read_bytes()).key
    size = hashlib.new(algorithm).digest_size
    pcrs = {algorithm: {0: quote.pcrs[:size], 7: quote.pcrs[size:]}}
    checked = verify_quote(quote.message, parse_signature(quote.signature), key, pcrs)
    assert checked.nonce == NONCE
    assert checked.selections == ((algorithm, (0, 7)),)
    assert any(pcrs[algorithm][7]) == (algorithm == "sha256")


def test_quote_for_another_nonce_is_refused(
    device: TpmDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(tmp_path, _activate(device), "00" * 32)
    with pytest.raises(AttestationError, match="wrong-binding"):
        verify(_evidence(device, monkeypatch, bytes(32)), policy, NOW, NONCE)


def test_other_boot_is_refused(
    device: TpmDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _policy(tmp_path, _activate(device), "00" * 32)
    extend(device, 4)
    with pytest.raises(AttestationError, match="wrong-measurement: pcr4"):
        verify(_evidence(device, monkeypatch, NONCE), policy, NOW, NONCE)


def test_quote_by_a_key_that_nobody_activated_is_refused(
    device: TpmDevice,
    other_device: TpmDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = _policy(tmp_path, _activate(device), "00" * 32)
    with pytest.raises(AttestationError, match="wrong-root"):
        verify(_evidence(other_device, monkeypatch, NONCE), policy, NOW, NONCE)


def test_certified_key_needs_no_activation(
    device: TpmDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = maker(NOW)
    key = parse_public(device.attestation_key()).key
    (tmp_path / "ak_certificate.pem").write_bytes(authority.certify(key, ATTESTATION_USAGE, NOW))
    monkeypatch.setenv("TPM2TOOLS_TCTI", device.tcti)
    settings = AttesterSettings(source="tpm", folder=tmp_path)
    evidence = ATTESTERS.get("tpm").attest(settings, NONCE)
    claims = claims_of(evidence, Trust(at=NOW, roots={evidence.platform: authority.pem}))
    assert claims.details["trusted_by"] == "a certificate by CN=Maker of a test"


def test_endorsement_certificate_leads_to_the_makers_root(device: TpmDevice) -> None:
    authority = maker(NOW)
    ek = parse_public(device.endorsement_key())
    chain = authority.certify(ek.key, ENDORSEMENT_USAGE, NOW)
    challenge = begin_activation(request_activation(device, chain), authority.pem, NOW)
    pem = finish_activation(challenge, device.activate(challenge.credential))
    assert pem == key_pem(parse_public(device.attestation_key()).key)


def test_another_tpm_cannot_answer(device: TpmDevice, other_device: TpmDevice) -> None:
    with pytest.raises(ConfigError, match="tpm2_activatecredential"):
        _activate(device, other_device)


def test_credential_for_another_attestation_key_is_refused_by_the_tpm(
    device: TpmDevice, other_device: TpmDevice
) -> None:
    # The right TPM, but the key that wants to be believed is not in it.
    request = request_activation(device)
    stolen = type(request)(ek=request.ek, ak=other_device.attestation_key())
    known = key_pem(parse_public(request.ek).key)
    challenge = begin_activation(stolen, known, NOW)
    with pytest.raises(ConfigError, match="tpm2_activatecredential"):
        device.activate(challenge.credential)


def test_wrong_answer_is_refused(device: TpmDevice) -> None:
    request = request_activation(device)
    challenge = begin_activation(request, key_pem(parse_public(request.ek).key), NOW)
    with pytest.raises(AttestationError, match="wrong-binding"):
        finish_activation(challenge, bytes(32))
    assert challenge.secret.hex() not in repr(challenge)
    assert str(challenge.secret) not in repr(challenge)


def test_endorsement_key_that_nobody_vouches_for_is_refused(device: TpmDevice) -> None:
    with pytest.raises(AttestationError, match="wrong-root"):
        begin_activation(request_activation(device), b"", NOW)


def test_sealed_secret_comes_back_after_a_restart_of_the_program(
    device: TpmDevice, tmp_path: Path
) -> None:
    write_sealed(tmp_path / "key", seal(device, b"a key of 32 bytes, or nearly so", [0, 4, 7]))
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    again = unseal(TpmDevice(device.tcti), read_sealed(tmp_path / "key"))
    assert again == b"a key of 32 bytes, or nearly so"


def test_secret_stays_sealed_after_an_extend(device: TpmDevice) -> None:
    sealed = seal(device, b"secret", [4])
    extend(device, 5)
    assert unseal(device, sealed) == b"secret"
    extend(device, 4)
    with pytest.raises(AttestationError, match="wrong-measurement"):
        unseal(device, sealed)


def test_leaving_out_the_pcrs_does_not_unseal(device: TpmDevice) -> None:
    sealed = seal(device, b"secret", [4])
    extend(device, 4)
    with pytest.raises((AttestationError, ConfigError)):
        unseal(device, type(sealed)(pcrs=(5,), public=sealed.public, private=sealed.private))


def test_another_tpm_does_not_unseal(device: TpmDevice, other_device: TpmDevice) -> None:
    with pytest.raises(ConfigError, match="tpm2_load"):
        unseal(other_device, seal(device, b"secret", [4]))
