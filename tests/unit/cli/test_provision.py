"""Provisioning by commands: alone on one machine, and between two people."""

from pathlib import Path

import pytest

from tests.unit.cli.cli_world import run_command


def test_local_makes_keys_that_are_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    ran = run_command(
        capsys, "provision", "--local", "--folder", folder, "--name", "clinic", "--json"
    )
    assert ran.code == 0
    clients = ran.result["clients"]
    assert isinstance(clients, dict)
    assert Path(clients["clinic"]["key"]).stat().st_mode & 0o777 == 0o600
    for member in ("clinic", "server"):
        checked = run_command(capsys, "provision", "check", folder / member, "--json")
        assert (checked.code, checked.result) == (0, {"ok": True, "findings": []})


def test_request_approve_install_renew_and_revoke(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, member = tmp_path / "owner", tmp_path / "clinic"
    made = run_command(capsys, "provision", "init", owner, "--name", "study", "--json")
    asked = run_command(capsys, "provision", "request", member, "--name", "clinic", "--json")
    request, print_ = asked.result["request"], asked.result["fingerprint"]
    shown = run_command(capsys, "provision", "show", request, "--json")
    assert shown.result["fingerprint"] == print_
    approve = ("provision", "approve", request, "--authority", owner, "--json")
    granted = run_command(capsys, *approve, "--fingerprint", print_, "--role", "train")
    kit = granted.result["kit"]
    assert run_command(capsys, "provision", "show", kit, "--json").result["roles"] == ["train"]
    install = ("provision", "install", kit, member)
    done = run_command(capsys, *install, "--fingerprint", made.result["fingerprint"], "--json")
    assert done.result["name"] == "clinic"
    renewed = run_command(capsys, "provision", "renew", member, "--json")
    assert renewed.result["fingerprint"] == print_
    revoked = run_command(capsys, "provision", "revoke", "clinic", "--authority", owner, "--json")
    assert len(revoked.result["serials"]) == 1  # type: ignore[arg-type]
    updated = run_command(capsys, "provision", "update", owner / "revoked.pem", member, "--json")
    assert updated.result["num_revoked"] == 1
    checked = run_command(capsys, "provision", "check", member, "--json")
    assert checked.code == 2
    assert "is revoked" in checked.err


def test_approval_needs_the_fingerprint_that_was_read_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, member = tmp_path / "owner", tmp_path / "clinic"
    run_command(capsys, "provision", "init", owner, "--name", "study")
    asked = run_command(capsys, "provision", "request", member, "--name", "clinic", "--json")
    request = asked.result["request"]
    refused = run_command(
        capsys, "provision", "approve", request, "--authority", owner, "--fingerprint", "00" * 32
    )
    assert refused.code == 9
    assert "approve nothing" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("provision",), "--local, or a subcommand"),
        (("provision", "--local", "check", "x"), "leave the subcommand out"),
        (("provision", "request", "x", "--name", "a", "--kind", "king"), "client or server"),
        (("provision", "revoke", "serial:xyz", "--authority", "AUTHORITY"), "no serial number"),
    ],
)
def test_a_mistake_is_named(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = tmp_path / "owner"
    run_command(capsys, "provision", "init", owner, "--name", "study")
    argv = [str(owner) if word == "AUTHORITY" else word for word in words]
    ran = run_command(capsys, *argv)
    assert ran.code == 2
    assert said in ran.err


def test_an_authority_with_a_passphrase_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, secret = tmp_path / "owner", tmp_path / "secret"
    secret.write_text("correct horse\n")
    secret.chmod(0o600)
    with_it = ("--passphrase-file", secret)
    assert run_command(capsys, "provision", "init", owner, "--name", "study", *with_it).code == 0
    publish = ("provision", "publish", "--authority", owner)
    assert run_command(capsys, *publish, *with_it).code == 0
    assert run_command(capsys, *publish).code == 6
