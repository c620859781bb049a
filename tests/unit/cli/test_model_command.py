"""`cutlayer model`: seal, look, sign and check, as a security officer types it."""

import json
import threading
from pathlib import Path

import pytest

from cutlayer.errors import TransportError
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.challenge import Prover
from cutlayer.tee.exhibit import Side
from cutlayer.tee.measure import measure_package
from cutlayer.tee.private_model.exchange import receive
from cutlayer.tee.private_model.key_holder import KeyFolder
from cutlayer.tee.private_model.label import read_label
from cutlayer.tee.private_model.sealed_adapter import open_adapter
from cutlayer.tee.private_model.sealed_part import SealedFolder
from cutlayer.tee.synthetic_quoter import ROOT_FILE, SyntheticQuoter
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import run_command


def _json(out: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(out.splitlines()[-1])
    return found


def test_a_part_is_sealed_under_a_key_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, keys = tiny_llama_folder(tmp_path), tmp_path / "keys"
    words = ("model", "seal", model, "--lower", "1", "--upper", "3", "--keys", keys)
    ran = run_command(capsys, *words, "--out", tmp_path / "sealed", "--json")
    found = _json(ran.out)
    label = read_label(tmp_path / "sealed")
    assert found["digest"] == label.digest
    with KeyFolder(keys).load(label) as key, key.view() as view:
        assert "config" in SealedFolder(tmp_path / "sealed", bytes(view)).leaves
        assert bytes(view).hex() not in ran.out + ran.err
    ran = run_command(capsys, "model", "inspect", tmp_path / "sealed", "--json")
    assert _json(ran.out)["part"] == "trunk"
    ran = run_command(capsys, *words, "--out", tmp_path / "sealed", "--part", "middle")
    assert ran.code == 2


def test_an_adapter_is_sealed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    words = ("--out", tmp_path / "sealed", "--keys", tmp_path / "keys")
    assert run_command(capsys, "model", "seal-adapter", tmp_path / "plain", *words).code == 0
    label = read_label(tmp_path / "sealed")
    with KeyFolder(tmp_path / "keys").load(label) as key, key.view() as view:
        assert open_adapter(tmp_path / "sealed", bytes(view)) == {"adapter_config.json": b"{}"}


def test_an_owner_signs_a_consent_and_anybody_checks_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tiny_llama_folder(tmp_path)
    digest = _json(run_command(capsys, "assets", "manifest", model, "--json").out)["digest"]
    run_command(capsys, "model", "owner-key", tmp_path / "owner.pem")
    given = ("--model", digest, "--to", "clinic")
    sign = ("model", "consent", tmp_path / "c.json", "--key", tmp_path / "owner.pem", *given)
    assert run_command(capsys, *sign, "--until", "2026-12-31").code == 0
    check = ("model", "check-consent", tmp_path / "c.json", "--owner", tmp_path / "owner.pub.pem")
    ran = run_command(capsys, *check, *given, "--at", "2026-12-31T23:59:00Z")
    assert "2026-12-31 23:59:59 UTC" in ran.out
    late = run_command(capsys, *check, *given, "--at", "2027-01-01")
    assert late.code == 9
    assert "ended" in late.err
    other = run_command(capsys, *check, "--model", digest, "--to", "bank")
    assert other.code == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "xyz", "--until", "2026-12-31"), "cutlayer assets manifest"),
        (("--model", "ab" * 32, "--until", "soon"), "is no time"),
        (("--model", "ab" * 32, "--until", "2026-12-31T10:00:00"), "no time zone"),
        (("--model", "ab" * 32, "--until", "2026-12-31", "--what", "logs"), "adapter or weights"),
    ],
)
def test_mistakes_say_what_to_write(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    run_command(capsys, "model", "owner-key", tmp_path / "owner.pem")
    start = ("model", "consent", tmp_path / "c.json", "--key", tmp_path / "owner.pem")
    ran = run_command(capsys, *start, "--to", "clinic", *words)
    assert ran.code == 2
    assert said in ran.err


@pytest.mark.parametrize(("software", "code"), [("this", 0), ("other", 13)])
def test_a_key_is_released_to_a_place_that_the_policy_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, software: str, code: int
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    keys, sealed = ("--keys", tmp_path / "keys"), tmp_path / "sealed"
    run_command(capsys, "model", "seal-adapter", tmp_path / "plain", "--out", sealed, *keys)
    SyntheticQuoter.open(tmp_path / "machine")
    measured = measure_package().hex() if software == "this" else "00" * 48
    run_command(
        capsys,
        *("attest", "policy", "init", tmp_path / "policy.toml", "--platform", "simulated"),
        *("--measurement", f"mr_td={measured}"),
        *("--root", f"simulated={tmp_path / 'machine' / ROOT_FILE}"),
    )
    label, heard = read_label(sealed), []
    attester = AttesterSettings(source="simulated", folder=tmp_path / "machine")

    def be_the_place() -> None:
        try:
            with receive(label, Prover(attester, Side.SERVER), tmp_path / "x", 3.0) as key:
                heard.append(len(key))
        except TransportError:
            heard.append(0)

    place = threading.Thread(target=be_the_place)
    place.start()
    words = ("--policy", tmp_path / "policy.toml", "--exchange", tmp_path / "x", "--timeout", "20")
    ran = run_command(capsys, "model", "release", sealed, *words, *keys, "--json")
    place.join(20)
    assert ran.code == code
    assert heard == [32 if code == 0 else 0]
    if code == 0:
        assert _json(ran.out)["assurance"] == "SIMULATED"
    else:
        assert "wrong-measurement" in ran.err
