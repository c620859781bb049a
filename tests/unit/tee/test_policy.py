"""Every reason of `appraise` to refuse, each shown by claims that lack only that."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cutlayer.errors import AttestationError, ConfigError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Platform
from cutlayer.tee.policy import Policy, appraise, read_policy

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
REPORT_DATA = bytes(range(32))
MEASURED = "ab" * 48
POLICY = Policy(
    name="test",
    platforms=[Platform.TDX],
    measurements={"mr_td": [MEASURED], "rtmr3": ["01" * 48, "02" * 48]},
    least_tcb_evaluation=17,
    chips=["C0FFEE"],
    gpus=1,
    gpu_measurements={"measurement_2": ["dd" * 48]},
)
GPU = Claims(
    platform=Platform.NVIDIA,
    assurance=Assurance.HARDWARE_TEE,
    measurements={"measurement_2": "dd" * 48},
    report_data=REPORT_DATA,
    is_debug=False,
    tcb_status="UpToDate",
)
BY_REPORT = replace(GPU, chip="7f", details={"ueid": "123"})
BY_TOKEN = replace(GPU, chip="123", details={"ueid": "123"})
GOOD = Claims(
    platform=Platform.TDX,
    assurance=Assurance.HARDWARE_TEE_GPU,
    measurements={"mr_td": MEASURED, "rtmr3": "02" * 48},
    report_data=REPORT_DATA.ljust(64, b"\0"),
    is_debug=False,
    tcb_status="UpToDate",
    tcb_evaluation=17,
    chip="c0ffee",
    issued_at=AT - timedelta(seconds=300),
    companions=(GPU,),
)


def refusal(
    claims: Claims, policy: Policy = POLICY, report_data: bytes | None = REPORT_DATA
) -> str:
    with pytest.raises(AttestationError) as caught:
        appraise(claims, policy, AT, report_data)
    return caught.value.refusal


def test_claims_that_meet_every_demand_pass() -> None:
    appraise(GOOD, POLICY, AT, REPORT_DATA)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (replace(GOOD, platform=Platform.SGX), "other-platform"),
        (replace(GOOD, assurance=Assurance.SIMULATED), "low-assurance"),
        (replace(GOOD, assurance=Assurance.MEASURED_BOOT), "low-assurance"),
        (replace(GOOD, is_debug=True), "debug"),
        (replace(GOOD, measurements={"rtmr3": "02" * 48}), "wrong-measurement"),
        (replace(GOOD, measurements={"mr_td": MEASURED, "rtmr3": "03" * 48}), "wrong-measurement"),
        (replace(GOOD, tcb_status="OutOfDate"), "tcb"),
        (replace(GOOD, advisories=("INTEL-SA-00837",)), "tcb"),
        (replace(GOOD, tcb_evaluation=16), "tcb"),
        (replace(GOOD, tcb_evaluation=None), "tcb"),
        (replace(GOOD, chip="0ddba11"), "wrong-chip"),
        (replace(GOOD, chip=None), "wrong-chip"),
        (replace(GOOD, issued_at=AT - timedelta(seconds=301)), "stale"),
        (replace(GOOD, issued_at=AT + timedelta(seconds=301)), "stale"),
        (replace(GOOD, report_data=bytes(64)), "wrong-binding"),
        (replace(GOOD, report_data=REPORT_DATA + b"\1" * 32), "wrong-binding"),
        (replace(GOOD, report_data=b""), "wrong-binding"),
        (replace(GOOD, companions=()), "no-gpu"),
        (replace(GOOD, companions=(replace(GPU, is_debug=True),)), "debug"),
        (replace(GOOD, companions=(replace(GPU, measurements={}),)), "wrong-measurement"),
        (replace(GOOD, companions=(replace(GPU, report_data=bytes(32)),)), "wrong-binding"),
        (replace(GOOD, companions=(GPU, replace(GPU, is_debug=True))), "debug"),
        (replace(GOOD, companions=(replace(GPU, chip="1"), replace(GPU, chip="1"))), "no-gpu"),
        (replace(GOOD, companions=(BY_REPORT, BY_TOKEN)), "no-gpu"),
    ],
)
def test_each_fault_alone_is_refused_by_its_name(wrong: Claims, name: str) -> None:
    assert refusal(wrong) == name


@pytest.mark.parametrize("report_data", [b"", bytes(32), REPORT_DATA[:-1], REPORT_DATA + b"\1"])
def test_evidence_of_another_job_is_refused(report_data: bytes) -> None:
    assert refusal(GOOD, report_data=report_data) == "wrong-binding"


def test_a_file_alone_has_no_binding_to_check() -> None:
    appraise(replace(GOOD, report_data=b"\7" * 64), POLICY.model_copy(update={"gpus": 0}), AT, None)


def test_a_policy_without_measurements_accepts_only_simulated_machines() -> None:
    blank = POLICY.model_copy(update={"measurements": {}})
    assert refusal(GOOD, blank) == "wrong-measurement"
    lenient = blank.model_copy(update={"least_assurance": "simulated"})
    appraise(replace(GOOD, assurance=Assurance.SIMULATED), lenient, AT, REPORT_DATA)


@pytest.mark.parametrize(
    ("platform", "other"), [(Platform.AZURE, "measurement"), (Platform.TPM, "ak_sha256")]
)
def test_a_policy_that_pins_no_software_of_the_owners_accepts_nobody(
    platform: Platform, other: str
) -> None:
    # The paravisor is the cloud's for all its customers; a TPM signs whatever was booted.
    measured = {other: "aa" * 32, "pcr4": "bb" * 32}
    claims = replace(GOOD, platform=platform, measurements=measured)
    policy = POLICY.model_copy(
        update={"platforms": [platform], "measurements": {other: ["aa" * 32]}}
    )
    assert refusal(claims, policy) == "wrong-measurement"
    pinned = {name: [value] for name, value in measured.items()}
    appraise(claims, policy.model_copy(update={"measurements": pinned}), AT, REPORT_DATA)


def test_an_accelerator_is_judged_by_reference_values_or_by_its_vendors_word() -> None:
    unpinned = POLICY.model_copy(update={"gpu_measurements": {}})
    appraise(GOOD, unpinned, AT, REPORT_DATA)
    unknown = replace(GOOD, companions=(replace(GPU, tcb_status="NotCompared"),))
    assert refusal(unknown, unpinned) == "tcb"
    appraise(unknown, POLICY, AT, REPORT_DATA)
    # Any firmware says such a version.
    version = {"driver_version": "3630302e31"}
    named = replace(GPU, measurements=version, tcb_status="NotCompared")
    by_word = unpinned.model_copy(
        update={"gpu_measurements": {name: [value] for name, value in version.items()}}
    )
    assert refusal(replace(GOOD, companions=(named,)), by_word) == "tcb"


def test_what_the_policy_accepts_beside_the_best_passes() -> None:
    state = replace(GOOD, tcb_status="SWHardeningNeeded", advisories=("INTEL-SA-00615",))
    assert refusal(state) == "tcb"
    accepted = {"tcb_statuses": ["UpToDate", "SWHardeningNeeded"], "advisories": ["INTEL-SA-00615"]}
    appraise(state, POLICY.model_copy(update=accepted), AT, REPORT_DATA)


@pytest.mark.parametrize("level", list(Assurance))
def test_a_level_meets_itself_and_what_is_below(level: Assurance) -> None:
    claims = replace(GOOD, assurance=level)
    for wanted in Assurance:
        policy = POLICY.model_copy(update={"least_assurance": wanted.label.lower()})
        if level >= wanted:
            appraise(claims, policy, AT, REPORT_DATA)
        else:
            assert refusal(claims, policy) == "low-assurance"


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_and_its_roots_lie_beside_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'name = "lab"\nplatforms = ["simulated"]\nleast_assurance = "simulated"\n'
        f'[measurements]\nmr_td = ["{MEASURED.upper()}"]\n[roots]\nsimulated = "root.pem"\n',
    )
    (tmp_path / "root.pem").write_bytes(b"PEM")
    policy = read_policy(path)
    assert policy.measurements == {"mr_td": [MEASURED]}
    assert policy.read_roots() == {Platform.SIMULATED: b"PEM"}
    (tmp_path / "root.pem").unlink()
    with pytest.raises(ConfigError, match=r"cannot read the root .*root\.pem"):
        policy.read_roots()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('platforms = ["tdx"]', "name is required"),
        ('name = "x"\nplatforms = []', "platforms"),
        ('name = "x"\nplatforms = ["z80"]', "z80"),
        ('name = "x"\nplatforms = ["tdx"]\nleast_assurance = "high"', "known: simulated"),
        ('name = "x"\nplatforms = ["tdx"]\n[measurements]\nmr_td = ["xyz"]', "no hex number"),
        ('name = "x"\nplatforms = ["tdx"]\nmeasurement = {}', "did you mean measurements"),
        ('name = "x"\nplatforms = ["tdx"]\nmax_age_s = 0', "max_age_s"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_policy(write(tmp_path, text))


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read settings .*none\.toml"):
        read_policy(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {"max_age_s": p.max_age_s + 1},
        lambda p: {"measurements": {**p.measurements, "mr_td": ["00"]}},
        lambda p: {"least_assurance": "simulated"},
    ],
)
def test_the_digest_follows_every_value(change: Callable[[Policy], dict[str, object]]) -> None:
    assert POLICY.digest == POLICY.model_copy().digest
    assert POLICY.model_copy(update=change(POLICY)).digest != POLICY.digest


def test_the_digest_follows_what_a_root_holds_and_not_where_it_lies(tmp_path: Path) -> None:
    digests = []
    for folder, content in (("here", b"root"), ("there", b"root"), ("there", b"another")):
        path = tmp_path / folder / "root.pem"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        digests.append(POLICY.model_copy(update={"roots": {Platform.TPM: path}}).digest)
    assert digests[0] == digests[1] != digests[2]
    assert POLICY.digest not in digests
