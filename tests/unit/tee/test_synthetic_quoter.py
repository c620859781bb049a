"""The test authority's quotes pass the production verifier under its own root, and no other."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cutlayer.errors import AttestationError, ConfigError, StorageError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.attest import attest
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.measure import measure_package
from cutlayer.tee.policy import Policy
from cutlayer.tee.synthetic_collateral import TcbState
from cutlayer.tee.synthetic_quoter import ROOT_FILE, Pretence, SyntheticQuoter
from cutlayer.tee.verifier import Trust, utc_now
from cutlayer.tee.verify import claims_of, verify

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
MR_TD = bytes(range(48))
REPORT_DATA = bytes(range(32))


@pytest.fixture(scope="module")
def quoter() -> SyntheticQuoter:
    return SyntheticQuoter.create()


def judged(quoter: SyntheticQuoter, pretence: Pretence | None = None) -> Claims:
    evidence = quoter.evidence(MR_TD, REPORT_DATA, AT, pretence)
    return claims_of(evidence, Trust(at=AT, roots={Platform.SIMULATED: quoter.root_pem}))


def refusal(quoter: SyntheticQuoter, pretence: Pretence) -> str:
    with pytest.raises(AttestationError) as caught:
        judged(quoter, pretence)
    return caught.value.refusal


def test_an_honest_machine_passes_and_is_simulated(quoter: SyntheticQuoter) -> None:
    claims = judged(quoter)
    assert claims.assurance is Assurance.SIMULATED
    assert claims.measurements["mr_td"] == MR_TD.hex()
    assert claims.report_data == REPORT_DATA + bytes(32)
    assert (claims.tcb_status, claims.advisories, claims.is_debug) == ("UpToDate", (), False)


def test_what_it_pretends_is_what_the_claims_say(quoter: SyntheticQuoter) -> None:
    state = TcbState(status="OutOfDate", advisories=("INTEL-SA-00001",))
    claims = judged(quoter, Pretence(rtmrs=(b"\x07" * 48,) * 4, tcb=state))
    assert claims.measurements["rtmr3"] == "07" * 48
    assert (claims.tcb_status, claims.advisories) == ("OutOfDate", ("INTEL-SA-00001",))


@pytest.mark.parametrize(
    ("pretence", "name"),
    [
        (Pretence(is_debug=True), "debug"),
        (Pretence(tcb=TcbState(is_unknown=True)), "tcb"),
        (Pretence(tcb=TcbState(is_revoked=True)), "revoked"),
        (Pretence(collateral_age=timedelta(days=31)), "expired"),
        (Pretence(collateral_age=timedelta(days=-2)), "not-yet-valid"),
    ],
)
def test_what_a_verifier_must_refuse_has_its_name(
    quoter: SyntheticQuoter, pretence: Pretence, name: str
) -> None:
    assert refusal(quoter, pretence) == name


@pytest.mark.parametrize("platform", [Platform.TDX, Platform.SIMULATED])
def test_other_roots_than_its_own_refuse_it(quoter: SyntheticQuoter, platform: Platform) -> None:
    made = quoter.evidence(MR_TD, REPORT_DATA, AT)
    evidence = Evidence(platform=platform, body=made.body, collateral=made.collateral)
    other = {Platform.SIMULATED: SyntheticQuoter.create().root_pem}
    # Intel's for TDX, another test root or none for simulated.
    for roots in (other, {}):
        with pytest.raises(AttestationError) as caught:
            claims_of(evidence, Trust(at=AT, roots=roots))
        assert caught.value.refusal == "wrong-root"


def test_a_replaced_root_of_tdx_makes_it_simulated(quoter: SyntheticQuoter) -> None:
    made = quoter.evidence(MR_TD, REPORT_DATA, AT)
    evidence = Evidence(platform=Platform.TDX, body=made.body, collateral=made.collateral)
    claims = claims_of(evidence, Trust(at=AT, roots={Platform.TDX: quoter.root_pem}))
    assert claims.assurance is Assurance.SIMULATED


def test_a_folder_keeps_the_machine_and_its_keys_private(tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    first, second = SyntheticQuoter.open(folder), SyntheticQuoter.open(folder)
    assert first.root_pem == second.root_pem == (folder / ROOT_FILE).read_bytes()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "authority.json").stat().st_mode & 0o777 == 0o600
    (folder / "authority.json").chmod(0o644)
    with pytest.raises(StorageError, match="mode 0644"):
        SyntheticQuoter.open(folder)


def test_a_damaged_key_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "machine"
    SyntheticQuoter.open(folder)
    (folder / "authority.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"authority\.json holds no simulated authority"):
        SyntheticQuoter.open(folder)


def test_the_attester_claims_this_installation_and_a_policy_accepts_it(tmp_path: Path) -> None:
    settings = AttesterSettings(source="simulated", folder=tmp_path / "machine")
    evidence = attest(settings, REPORT_DATA)
    policy = Policy(
        name="test",
        platforms=[Platform.SIMULATED],
        least_assurance="simulated",
        measurements={"mr_td": [measure_package().hex()]},
        roots={Platform.SIMULATED: tmp_path / "machine" / ROOT_FILE},
    )
    result = verify(evidence, policy, utc_now(), REPORT_DATA)
    assert result.assurance.label == "SIMULATED"


def test_the_attester_wants_a_folder() -> None:
    with pytest.raises(ConfigError, match="key `folder`"):
        attest(AttesterSettings(source="simulated"), REPORT_DATA)
