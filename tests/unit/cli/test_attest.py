"""`cutlayer attest`: what is written is accepted, what is refused has a name and exit code 13."""

import json
import tomllib
from pathlib import Path

import pytest

from cutlayer.tee.evidence import Evidence, Platform, read_evidence
from cutlayer.tee.measure import measure_folder, measure_package
from cutlayer.tee.policy import read_policy
from tests.unit.cli.cli_world import run_command
from tests.unit.tee.authorities import AT
from tests.unit.tee.azure_worlds import AzureVm
from tests.unit.tee.evidence_samples import PUBLISHED_FOLDER, published
from tests.unit.tee.snp_worlds import Wished, make_chip

NONCE = "11" * 32


@pytest.fixture
def machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with evidence of a simulated machine and the policy for it."""
    folder = tmp_path / "lab"
    folder.mkdir()
    keys = str(folder / "machine")
    quote = ("attest", "quote", str(folder / "evidence.json"), "--source", "simulated")
    ran = run_command(capsys, *quote, "--folder", keys, "--report-data", NONCE)
    assert ran.code == 0, ran.err
    begun = run_command(
        capsys, "attest", "policy", "init", str(folder / "policy.toml"), "--evidence",
        str(folder / "evidence.json"), "--root", f"simulated={keys}/root.pem", "--name", "lab",
    )  # fmt: skip
    assert begun.code == 0, begun.err
    return folder


def verify(
    capsys: pytest.CaptureFixture[str], folder: Path, *options: str
) -> tuple[int, dict[str, object], str]:
    paths = (str(folder / "evidence.json"), "--policy", str(folder / "policy.toml"))
    ran = run_command(capsys, "attest", "verify", *paths, "--json", *options)
    return ran.code, json.loads(ran.out.splitlines()[-1]), ran.err


def test_what_was_begun_accepts_what_it_was_shown(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result, errors = verify(capsys, machine, "--report-data", NONCE)
    assert (code, result["verdict"], result["policy"]) == (0, "accepted", "lab")
    assert result["assurance"] == "SIMULATED"
    assert result["is_binding_checked"] is True
    assert result["measurements"]["mr_td"] == measure_package().hex()  # type: ignore[index]
    assert result["policy_digest"] == read_policy(machine / "policy.toml").digest
    assert "warning: SIMULATED: made by software" in errors


def test_people_read_simulated_too(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = (str(machine / "evidence.json"), "--policy", str(machine / "policy.toml"))
    ran = run_command(capsys, "attest", "verify", *paths)
    assert ran.out.startswith("SIMULATED: simulated, firmware UpToDate\n")
    assert f"  mr_td            {measure_package().hex()}\n" in ran.out
    assert "not checked: whom it speaks for" in ran.out


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (("--report-data", "22" * 32), "wrong-binding"),
        (("--at", "2030-01-01"), "expired"),
        (("--at", "2020-01-01T00:00:00+02:00"), "not-yet-valid"),
        (("--platform", "tdx"), "other-platform"),
        (("--collateral", "intel=policy.toml"), "malformed"),
    ],
)
def test_a_refusal_has_its_name_and_exit_code_13(
    machine: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    refusal: str,
) -> None:
    monkeypatch.chdir(machine)
    code, result, errors = verify(capsys, machine, *options)
    assert (code, result["exit_code"]) == (13, 13)
    assert (result["error"], result["refusal"]) == ("AttestationError", refusal)
    assert f"error: {refusal}: " in errors


def test_another_measurement_is_refused(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = machine / "policy.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(measure_package().hex(), "00" * 48), encoding="utf-8")
    assert verify(capsys, machine)[1]["refusal"] == "wrong-measurement"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--at", "soon"), "--at 'soon' is no time"),
        (("--report-data", "xy"), "is no hex number"),
        (("--report-data", "00" * 65), "1 to 64 can be bound"),
        (("--platform", "z80"), "no platform is called 'z80'"),
        (("--collateral", "intel"), "NAME=VALUE"),
        (("--collateral", "intel=none.json"), r"cannot read collateral none.json"),
        (("--collateral", "a=x", "--collateral", "a=y"), "names 'a' twice"),
    ],
)
def test_a_wrong_option_is_explained(
    machine: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    code, result, _ = verify(capsys, machine, *options)
    assert code == 2
    assert message in str(result["message"])
    assert "refusal" not in result


def test_a_first_policy_explains_every_key(machine: Path) -> None:
    text = (machine / "policy.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    assert table["roots"] == {"simulated": "machine/root.pem"}
    lines = text.splitlines()
    for key in table:
        place = next(i for i, line in enumerate(lines) if line.startswith((f"{key} =", f"[{key}]")))
        assert lines[place - 1].startswith("# "), key
    # What was measured and is not pinned stands there to be pinned.
    assert '# rtmr3 = ["' in text


def test_a_policy_is_never_overwritten(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_command(capsys, "attest", "policy", "init", str(machine / "policy.toml"))
    assert ran.code == 2
    assert "exists" in ran.err


def test_a_policy_comes_from_verified_evidence_alone(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, evidence = machine / "new.toml", str(machine / "evidence.json")
    ran = run_command(capsys, "attest", "policy", "init", str(path), "--evidence", evidence)
    assert ran.code == 13
    assert not path.exists()


def test_a_policy_from_reference_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cloud.toml"
    values = ("--measurement", f"mr_td={'AB' * 48}", "--measurement", f"rtmr1={'cd' * 48}")
    init = ("attest", "policy", "init", str(path), "--platform", "tdx")
    assert run_command(capsys, *init, *values).code == 0
    policy = read_policy(path)
    assert policy.measurements == {"mr_td": ["ab" * 48], "rtmr1": ["cd" * 48]}
    assert (policy.name, policy.least_assurance) == ("cloud", "hardware-tee")
    path.unlink()
    ran = run_command(capsys, *init)
    assert ran.code == 2
    assert "needs reference values" in ran.err
    ran = run_command(capsys, *init, "--measurement", "mr_td=xyz")
    assert ran.code == 2
    assert not path.exists()


def test_simulated_needs_no_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.toml"
    assert run_command(capsys, "attest", "policy", "init", str(path)).code == 0
    assert read_policy(path).measurements == {"mr_td": [measure_package().hex()]}


def test_measure_prints_what_the_policy_pins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(capsys, "attest", "measure").out == f"{measure_package().hex()}\n"
    (tmp_path / "a.py").write_text("a = 1\n")
    ran = run_command(capsys, "attest", "measure", str(tmp_path), "--json")
    assert json.loads(ran.out)["measurement"] == measure_folder(tmp_path).hex()
    assert run_command(capsys, "attest", "measure", str(tmp_path / "none")).code == 2


def test_quote_takes_the_table_of_a_settings_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, path = tmp_path / "client.toml", tmp_path / "evidence.json"
    config.write_text(
        f'[tee.attester]\nsource = "simulated"\nfolder = "{tmp_path / "machine"}"\n',
        encoding="utf-8",
    )
    ran = run_command(capsys, "attest", "quote", str(path), "--config", str(config), "--json")
    assert json.loads(ran.out)["platform"] == "simulated"
    assert read_evidence(path).platform == "simulated"
    config.write_text("[run]\n", encoding="utf-8")
    ran = run_command(capsys, "attest", "quote", str(path), "--config", str(config))
    assert (ran.code, "no table [tee.attester]" in ran.err) == (2, True)
    assert run_command(capsys, "attest", "quote", str(path)).code == 2


@pytest.mark.system
def test_raw_vendor_bytes_are_accepted_with_their_platform(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published("tdx_quote")
    raw = (str(PUBLISHED_FOLDER / "tdx_quote"), "--platform", "tdx", "--at", "2025-07-01")
    intel = ("--collateral", f"intel={PUBLISHED_FOLDER / 'tdx_quote_collateral.json'}")
    policy = str(tmp_path / "policy.toml")
    assert (
        run_command(capsys, "attest", "policy", "init", policy, "--evidence", *raw, *intel).code
        == 0
    )
    ran = run_command(capsys, "attest", "verify", *raw, *intel, "--policy", policy, "--json")
    assert json.loads(ran.out)["assurance"] == "hardware-tee"
    bare = run_command(capsys, "attest", "verify", *raw, "--policy", policy, "--json")
    assert json.loads(bare.out)["refusal"] == "no-collateral"


@pytest.mark.system
def test_an_officer_is_told_what_a_policy_takes_over_from_its_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published("sgx_quote")
    raw = (str(PUBLISHED_FOLDER / "sgx_quote"), "--platform", "sgx", "--at", "2025-07-01")
    intel = ("--collateral", f"intel={PUBLISHED_FOLDER / 'sgx_quote_collateral.json'}")
    path = str(tmp_path / "policy.toml")
    ran = run_command(capsys, "attest", "policy", "init", path, "--evidence", *raw, *intel)
    assert ran.code == 0
    assert "accepts firmware that is ConfigurationAndSWHardeningNeeded" in ran.err
    assert "accepts the advisories INTEL-SA-00289, INTEL-SA-00615" in ran.err


def test_evidence_writes_no_terminal_codes_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vm = AzureVm()
    runtime = vm.runtime().replace(b'"secure-boot": true', b'"x": "\\u001b[2K\\nhardware-tee"')
    evidence = Evidence(
        platform=Platform.AZURE, body=vm.report(runtime), collateral=vm.chip.collateral
    )
    (tmp_path / "evidence.json").write_bytes(evidence.to_json())
    (tmp_path / "ark.pem").write_bytes(vm.chip.ark.pem)
    ran = run_command(
        capsys, "attest", "policy", "init", str(tmp_path / "policy.toml"), "--evidence",
        str(tmp_path / "evidence.json"), "--root", f"azure={tmp_path / 'ark.pem'}", "--at",
        AT.isoformat(),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "hardware-tee" in ran.out
    assert "\x1b" not in ran.out
    assert "\nhardware-tee" not in ran.out


def test_a_policy_that_refuses_its_own_example_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chip = make_chip()
    evidence = tmp_path / "evidence.json"
    evidence.write_bytes(chip.evidence(Wished(policy=0xB0000)).to_json())
    (tmp_path / "ark.pem").write_bytes(chip.ark.pem)
    ran = run_command(
        capsys, "attest", "policy", "init", str(tmp_path / "policy.toml"), "--evidence",
        str(evidence), "--root", f"sev-snp={tmp_path / 'ark.pem'}", "--at", AT.isoformat(),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "this policy refuses the evidence that it was made from: debug" in ran.err
