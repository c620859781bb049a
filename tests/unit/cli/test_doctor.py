"""Doctor finds what is wrong, says it in one table, and exits with 2."""

import socket
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from cutlayer.cli.certificates import warn_of_expiry
from cutlayer.cli.checks import _num_weights
from cutlayer.cli.output import Output
from cutlayer.identity.provision import local, member_files
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Part
from cutlayer.server.server import TrunkServer
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import load_settings
from cutlayer.wire.endpoints import ConnectionSettings, TlsFiles
from tests.unit.cli.cli_world import CliWorld, Ran, run_command


def _findings(ran: Ran) -> dict[str, set[str]]:
    """Status by check; a check may have several findings."""
    checks = ran.result["checks"]
    assert isinstance(checks, list)
    found: dict[str, set[str]] = {}
    for check in checks:
        found.setdefault(check["name"], set()).add(check["status"])
    return found


def test_a_good_server_configuration_has_no_failure(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "doctor", "--config", world.server, "--json")
    assert ran.code == 0
    assert ran.result["role"] == "server"
    assert all(status <= {"ok", "warn"} for status in _findings(ran).values())
    assert {"memory", "certificates", "address", "model"} <= set(_findings(ran))


def test_a_client_meets_its_server_in_a_real_handshake(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    server = TrunkServer(load_settings(ServerSettings, world.server))
    server.start()
    try:
        address = f"connection.address=127.0.0.1:{server.port}"
        good = run_command(capsys, "doctor", "-c", world.client, "--set", address, "--json")
        other = ("--set", address, "--set", "model.upper=4", "--json")
        cut = run_command(capsys, "doctor", "-c", world.client, *other)
        stranger = ("--set", address, "--set", f"model.digest={'0' * 64}", "--json")
        digest = run_command(capsys, "doctor", "-c", world.client, *stranger)
    finally:
        server.stop(grace_s=0)
    assert good.code == 0, good.err
    assert _findings(good)["server"] == {"ok"}
    assert cut.code == digest.code == 2
    assert "SpecMismatch" in cut.out
    assert "upper" in cut.out
    assert "SpecMismatch" in digest.out


def test_quantised_weights_need_their_library(
    world: CliWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("doctor", "-c", world.server, "--set", "model.trunk_weights=nf4", "--json")
    assert _findings(run_command(capsys, *command))["weights"] == {"ok"}
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    ran = run_command(capsys, *command)
    assert ran.code == 2
    assert _findings(ran)["weights"] == {"fail"}
    assert "cutlayer[quantised]" in ran.out


def test_nobody_at_the_address_is_a_failure_and_leaves_no_run(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"connection.address=127.0.0.1:{unused.getsockname()[1]}"
        ran = run_command(capsys, "doctor", "-c", world.client, "--set", address, "--json")
    assert ran.code == 2
    assert _findings(ran)["server"] == {"fail"}
    assert not (world.folder / "run").exists()


def test_a_taken_address_is_a_failure(world: CliWorld, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"listen.address=127.0.0.1:{taken.getsockname()[1]}"
        ran = run_command(capsys, "doctor", "-c", world.server, "--set", address, "--json")
    assert ran.code == 2
    assert _findings(ran)["address"] == {"fail"}


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("model.upper=40", "cut"),
        ("model.upper=0", "cut"),
        ("model.path=nowhere", "model"),
        ("model.dtype=float12", "dtype"),
        ("data.train=nowhere.jsonl", "data.train"),
        ("connection.tls.key=nowhere.pem", "certificates"),
        ("run.key_file=nowhere.key", "storage key"),
    ],
)
def test_each_wrong_setting_fails_its_own_check(
    override: str, check: str, world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = "connection.address=127.0.0.1:1"
    ran = run_command(
        capsys, "doctor", "-c", world.client, "--set", dead, "--set", override, "--json"
    )
    assert ran.code == 2
    assert "fail" in _findings(ran)[check]


def test_a_key_that_others_can_read_is_a_failure(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.keys.server / "key.pem").chmod(0o644)
    ran = run_command(capsys, "doctor", "-c", world.server, "--json")
    assert ran.code == 2
    assert "fail" in _findings(ran)["private key"]


def test_an_open_run_folder_is_a_failure(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.folder / "run").mkdir(mode=0o755)
    dead = "connection.address=127.0.0.1:1"
    ran = run_command(capsys, "doctor", "-c", world.client, "--set", dead, "--json")
    assert _findings(ran)["run folder"] == {"fail"}


def test_settings_of_neither_side_are_refused(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    other = world.folder / "other.toml"
    other.write_text("[model]\npath = 'x'\n")
    ran = run_command(capsys, "doctor", "-c", other)
    assert ran.code == 2
    assert "neither [listen] nor [connection]" in ran.err


def test_doctor_leaves_no_thread_behind(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    run_command(capsys, "doctor", "-c", world.server)
    assert threading.active_count() == before


def test_memory_counts_only_the_own_parts(
    world: CliWorld, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaForCausalLM.from_pretrained(model).state_dict()
    own = sum(
        weight.numel()
        for name, weight in config.items()
        if ".layers." not in name or ".layers.0." in name or ".layers.3." in name
    )
    folder = resolve_model(model)
    assert _num_weights(folder, Cut(1, 3), (Part.HEAD, Part.TAIL)) == own
    whole = sum(weight.numel() for weight in config.values())
    assert _num_weights(folder, Cut(1, 3), (Part.TRUNK,)) == whole - own


@pytest.mark.parametrize(("days", "said"), [(20, "expires in"), (-3, "has expired")])
def test_a_certificate_near_its_end_is_warned_of(
    days: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = datetime.now(UTC) - timedelta(days=365 - days)
    keys = local(tmp_path / "keys", now=lambda: begin)
    files = member_files(keys.clients["client"])
    tls = TlsFiles(certificate=files.certificate, key=files.key, authority=files.authority)
    warn_of_expiry(ConnectionSettings(address="127.0.0.1:1", tls=tls), Output(as_json=False))
    captured = capsys.readouterr()
    assert said in captured.err
    assert "cutlayer provision renew" in captured.err
    assert captured.out == ""
