"""`cutlayer attest tpm`: from an unknown TPM to a quote that a policy accepts, step by step."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.tee.tpm_device import TpmDevice
from cutlayer.tee.tpm_keys import parse_public
from cutlayer.tee.tpm_trust import ENDORSEMENT_USAGE, key_pem
from cutlayer.tee.verifier import utc_now
from tests.tpm_worlds import extend, maker, software_tpm
from tests.unit.cli.cli_world import run_command

pytestmark = pytest.mark.system
NONCE = "22" * 32


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[TpmDevice]:
    with software_tpm() as found:
        monkeypatch.setenv("TPM2TOOLS_TCTI", found.tcti)
        yield found


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    ran = run_command(capsys, "attest", *arguments, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    ran = run_command(capsys, "attest", *arguments, "--json")
    assert ran.code != 0
    return str(json.loads(ran.out.splitlines()[-1])["message"])


def activated(capsys: pytest.CaptureFixture[str], device: TpmDevice, folder: Path) -> Path:
    """The policy's file of roots after the whole exchange."""
    authority = maker(utc_now())
    chain = authority.certify(
        parse_public(device.endorsement_key()).key, ENDORSEMENT_USAGE, utc_now()
    )
    (folder / "ek.pem").write_bytes(chain)
    (folder / "makers.pem").write_bytes(authority.pem)
    names = ("request", "challenge", "answer", "roots.pem", "kept", "ek.pem", "makers.pem")
    asked, challenge, answer, roots, kept, ek, makers = (str(folder / name) for name in names)
    run(capsys, "tpm", "request", asked, "--ek-certificate", ek)
    run(capsys, "tpm", "challenge", asked, challenge, "--roots", makers, "--keep", kept)
    assert (folder / "kept").stat().st_mode & 0o777 == 0o600
    run(capsys, "tpm", "answer", challenge, answer)
    added = run(capsys, "tpm", "accept", answer, roots, "--keep", kept)
    again = run(capsys, "tpm", "accept", answer, roots, "--keep", kept)
    assert added == again
    assert (folder / "roots.pem").read_bytes().count(b"BEGIN PUBLIC KEY") == 1
    return folder / "roots.pem"


def test_activated_tpm_is_accepted_until_it_boots_something_else(
    device: TpmDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = activated(capsys, device, tmp_path)
    evidence, policy = str(tmp_path / "evidence.json"), str(tmp_path / "policy.toml")
    run(capsys, "quote", evidence, "--source", "tpm", "--report-data", NONCE)
    run(capsys, "policy", "init", policy, "--evidence", evidence, "--root", f"tpm={roots}")
    verdict = ("verify", evidence, "--policy", policy, "--report-data", NONCE)
    assert run(capsys, *verdict)["assurance"] == "measured-boot"
    extend(device, 4)
    run(capsys, "quote", evidence, "--source", "tpm", "--report-data", NONCE)
    assert refused(capsys, *verdict).startswith("wrong-measurement")


def test_tpm_that_nobody_knows_is_not_challenged(
    device: TpmDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "others.pem").write_bytes(maker(utc_now()).pem)
    asked = str(tmp_path / "request")
    run(capsys, "tpm", "request", asked)
    ends = (str(tmp_path / "challenge"), "--roots", str(tmp_path / "others.pem"))
    message = refused(capsys, "tpm", "challenge", asked, *ends, "--keep", str(tmp_path / "kept"))
    assert message.startswith("wrong-root")
    assert not (tmp_path / "challenge").exists()


def test_wrong_answer_is_not_accepted(
    device: TpmDevice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = key_pem(parse_public(device.endorsement_key()).key)
    (tmp_path / "known.pem").write_bytes(key)
    asked, challenge, kept = (str(tmp_path / name) for name in ("request", "challenge", "kept"))
    run(capsys, "tpm", "request", asked)
    known = ("--roots", str(tmp_path / "known.pem"), "--keep", kept)
    run(capsys, "tpm", "challenge", asked, challenge, *known)
    (tmp_path / "answer").write_bytes(bytes(32))
    roots = tmp_path / "roots.pem"
    message = refused(capsys, "tpm", "accept", str(tmp_path / "answer"), str(roots), "--keep", kept)
    assert message.startswith("wrong-binding")
    assert not roots.exists()


@pytest.mark.parametrize("command", ["challenge", "accept"])
def test_file_of_another_kind_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"{}")
    other.chmod(0o600)
    arguments = [str(other), str(tmp_path / "out"), "--keep", str(other)]
    arguments += ["--roots", str(other)] if command == "challenge" else []
    assert str(other) in refused(capsys, "tpm", command, *arguments)
