"""Certificates that carry evidence: made, renewed, judged at a time, endorsed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cutlayer.errors import AttestationError, ConfigError, PermissionRefused
from cutlayer.identity.keys import new_key
from cutlayer.identity.provision import local, member_files
from cutlayer.storage.files import private_folder
from cutlayer.tee.binding import Binding
from cutlayer.tee.door import AttestedDoor
from cutlayer.tee.endorsement import Endorser, check_endorsement
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.policy import Policy
from cutlayer.tee.ra_tls import (
    ATTESTED_NAME,
    has_evidence,
    key_digest,
    make_certificate,
    verify_certificate,
)
from cutlayer.tee.synthetic_quoter import ROOT_FILE, SyntheticQuoter

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
MR_TD = b"m" * 48


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine") / "keys"
    SyntheticQuoter.open(folder)
    return folder


def policy(machine: Path, **changes: object) -> Policy:
    """Accepts that machine's software."""
    table = {
        "name": "test",
        "platforms": ["simulated"],
        "least_assurance": "simulated",
        "measurements": {"mr_td": [MR_TD.hex()]},
        "roots": {"simulated": machine / ROOT_FILE},
        **changes,
    }
    return Policy.model_validate(table)


def evidence(machine: Path, key: ec.EllipticCurvePrivateKey, at: datetime = AT) -> Evidence:
    """For the TLS key alone."""
    digest = key_digest(key.public_key())
    data = Binding(tls_key_sha256=digest, nonce=b"", spec_digest=b"").report_data()
    return SyntheticQuoter.open(machine).evidence(MR_TD, data, at)


def der_of(pem: bytes) -> bytes:
    """As TLS gives it."""
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def refusal(der: bytes, wanted: Policy, at: datetime = AT) -> str:
    """Name of the refusal."""
    with pytest.raises(AttestationError) as caught:
        verify_certificate(der, wanted, at)
    return caught.value.refusal


def test_a_certificate_gives_its_evidence_its_key_and_its_level(machine: Path) -> None:
    key = new_key()
    der = der_of(make_certificate(key, evidence(machine, key), AT))
    found = verify_certificate(der, policy(machine), AT)
    assert found.key_sha256 == key_digest(key.public_key())
    assert found.result.assurance.label == "SIMULATED"
    assert der_of(found.pem) == der
    assert has_evidence(der)
    names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == [ATTESTED_NAME]


@pytest.mark.parametrize(
    ("at", "name"),
    [
        (AT + timedelta(hours=23, minutes=54), None),
        (AT + timedelta(hours=23, minutes=56), "expired"),
        (AT - timedelta(minutes=9), None),
        (AT - timedelta(minutes=11), "not-yet-valid"),
    ],
)
def test_it_counts_for_a_day_whatever_the_clocks_say(
    machine: Path, at: datetime, name: str | None
) -> None:
    key = new_key()
    der = der_of(make_certificate(key, evidence(machine, key), AT))
    if name is None:
        verify_certificate(der, policy(machine), at)
    else:
        assert refusal(der, policy(machine), at) == name


def test_a_certificate_of_years_is_stale_at_any_time(machine: Path) -> None:
    key = new_key()
    short = x509.load_pem_x509_certificate(make_certificate(key, evidence(machine, key), AT))
    builder = x509.CertificateBuilder(
        short.issuer, short.subject, key.public_key(), short.serial_number
    )
    builder = builder.not_valid_before(AT).not_valid_after(AT + timedelta(days=999))
    for extension in short.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.sign(key, short.signature_hash_algorithm)
    assert refusal(made.public_bytes(Encoding.DER), policy(machine)) == "stale"


def test_every_flipped_byte_is_refused_with_a_name(machine: Path) -> None:
    key = new_key()
    der = der_of(make_certificate(key, evidence(machine, key), AT))
    for index in range(0, len(der), 97):
        changed = der[:index] + bytes([der[index] ^ 0x21]) + der[index + 1 :]
        assert refusal(changed, policy(machine))


@pytest.mark.parametrize("data", [b"", b"0\x82", bytes(200_000)])
def test_what_is_no_certificate_is_refused_with_a_name(machine: Path, data: bytes) -> None:
    assert refusal(data, policy(machine)) in {"no-evidence", "malformed"}
    assert not has_evidence(data)


def test_simulated_evidence_passes_no_policy_that_wants_hardware(machine: Path) -> None:
    key = new_key()
    der = der_of(make_certificate(key, evidence(machine, key), AT))
    strict = policy(machine, least_assurance="hardware-tee+gpu-cc", gpus=8)
    assert refusal(der, strict) == "low-assurance"


def test_evidence_that_fits_no_certificate_is_the_operators_error() -> None:
    huge = Evidence(platform=Platform.TDX, body=bytes(70_000))
    with pytest.raises(ConfigError, match="does not fit a certificate"):
        make_certificate(new_key(), huge, AT)


def test_evidence_of_accelerators_stays_out_of_the_certificate(machine: Path) -> None:
    key = new_key()
    gpu = Evidence(platform=Platform.NVIDIA, body=bytes(70_000))
    shown = evidence(machine, key)
    both = Evidence(
        platform=shown.platform, body=shown.body, collateral=shown.collateral, companions=[gpu]
    )
    der = der_of(make_certificate(key, both, AT))
    assert verify_certificate(der, policy(machine), AT).result.claims.companions == ()


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.at = AT

    def __call__(self) -> datetime:
        return self.at


def door(machine: Path, clock: Clock, fails: list[bool]) -> AttestedDoor:
    """A door whose attester fails when told so."""

    def attest(report_data: bytes) -> Evidence:
        if fails[0]:
            raise ConfigError("the quoting service is away")
        return SyntheticQuoter.open(machine).evidence(MR_TD, report_data, clock())

    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"")
    return AttestedDoor(attest, lambda key: extension, clock)


def test_the_certificate_is_renewed_at_half_its_life_under_the_same_key(machine: Path) -> None:
    clock = Clock()
    opened = door(machine, clock, [False])
    key, first = opened.shown()
    clock.at = AT + timedelta(hours=11)
    assert opened.shown() == (key, first)
    clock.at = AT + timedelta(hours=12)
    same_key, second = opened.shown()
    assert second != first
    assert same_key == key
    found = verify_certificate(der_of(second), policy(machine), AT + timedelta(hours=30))
    assert found.key_sha256 == opened.key_sha256
    assert key.decode().split("\n")[1] not in repr(opened)


def test_a_door_whose_attester_fails_shows_the_old_certificate_and_tries_again(
    machine: Path,
) -> None:
    clock, fails = Clock(), [False]
    opened = door(machine, clock, fails)
    first = opened.shown()
    fails[0], clock.at = True, AT + timedelta(hours=13)
    assert opened.shown() == first
    fails[0] = False
    assert opened.shown() == first
    clock.at = AT + timedelta(hours=14)
    assert opened.shown() != first


def test_a_door_that_cannot_attest_does_not_open(machine: Path) -> None:
    with pytest.raises(ConfigError, match="quoting service"):
        door(machine, Clock(), [True])


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = private_folder(tmp_path_factory.mktemp("kits") / "kits")
    local(folder, hosts=("trunk.example.org", "10.0.0.7"))
    return folder


def endorsed(machine: Path, kit: Path, signed_for: bytes | None = None) -> tuple[bytes, bytes]:
    """A certificate with the operator's word, and its key's digest."""
    key, files = new_key(), member_files(kit)
    digest = key_digest(key.public_key())
    extension = Endorser(files.certificate, files.key).extension(signed_for or digest)
    return make_certificate(key, evidence(machine, key), AT, (extension,)), digest


@pytest.mark.parametrize("host", ["trunk.example.org", "10.0.0.7"])
def test_the_operators_word_counts_for_its_hosts(machine: Path, kits: Path, host: str) -> None:
    pem, digest = endorsed(machine, kits / "server")
    now = datetime.now(UTC)
    check_endorsement(pem, digest, member_files(kits / "client").authority, host, now)


@pytest.mark.parametrize(
    ("kit", "host", "days", "said"),
    [
        ("server", "other.example.org", 0, "refuses the attested server's operator"),
        ("client", "trunk.example.org", 0, "refuses the attested server's operator"),
        ("server", "trunk.example.org", 9999, "refuses the attested server's operator"),
    ],
)
def test_another_host_purpose_or_time_is_refused(
    machine: Path, kits: Path, kit: str, host: str, days: int, said: str
) -> None:
    pem, digest = endorsed(machine, kits / kit)
    at = datetime.now(UTC) + timedelta(days=days)
    with pytest.raises(PermissionRefused, match=said):
        check_endorsement(pem, digest, member_files(kits / "client").authority, host, at)


def test_a_word_for_another_key_is_refused(machine: Path, kits: Path) -> None:
    pem, digest = endorsed(machine, kits / "server", signed_for=b"o" * 32)
    authority = member_files(kits / "client").authority
    with pytest.raises(PermissionRefused, match="another TLS key"):
        check_endorsement(pem, digest, authority, "trunk.example.org", datetime.now(UTC))
