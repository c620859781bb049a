"""What every registered verifier keeps, whatever the bytes are: one verdict or one named refusal.

The samples are `evidence_samples`'; a platform is exempt from nothing here.
"""

import random
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cutlayer.errors import AttestationError
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.refusal import Refusal
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from cutlayer.tee.verifier import VERIFIERS, Trust
from cutlayer.tee.verify import claims_of
from tests.unit.tee.evidence_samples import MADE, PUBLISHED, Sample, sample

SAMPLES = [*MADE, *(pytest.param(name, marks=pytest.mark.system) for name in PUBLISHED)]
NUM_FLIPS, NUM_CUTS = 50, 15
AT = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture(params=SAMPLES)
def good(request: pytest.FixtureRequest) -> Sample:
    return sample(request.param)


def verdict(evidence: Evidence, trust: Trust) -> Claims | str:
    """Claims, or the name of the refusal; anything else fails the test."""
    try:
        claims = claims_of(evidence, trust)
    except AttestationError as error:
        refusal, text = error.refusal, str(error)
    else:
        return claims
    assert refusal in tuple(Refusal)
    assert text.startswith(f"{refusal}: ")
    return refusal


def flipped(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def damaged(data: bytes, dice: random.Random) -> Iterator[bytes]:
    """Single bits, ends that are cut off, ends that are added, parts that repeat."""
    for _ in range(NUM_FLIPS):
        yield flipped(data, dice)
    for _ in range(NUM_CUTS):
        yield data[: dice.randrange(len(data))]
    yield data + data
    yield data[1:]
    yield b""


def with_collateral(evidence: Evidence, name: str, data: bytes) -> Evidence:
    return msgspec.structs.replace(evidence, collateral={**evidence.collateral, name: data})


def test_every_platform_has_a_sample() -> None:
    covered = {name.removeprefix("published ").split()[0] for name in (*MADE, *PUBLISHED)}
    assert set(VERIFIERS) == covered


def test_good_evidence_passes_and_twice_the_same(good: Sample) -> None:
    first = claims_of(good.evidence, good.trust)
    assert first.platform is good.evidence.platform
    assert first.measurements
    assert all(
        value == value.lower() and bytes.fromhex(value) for value in first.measurements.values()
    )
    assert claims_of(good.evidence, good.trust) == first


def test_a_damaged_body_never_says_anything_else(good: Sample) -> None:
    # Bytes that nobody signed may change (the root within a chain); what is claimed may not.
    truth = verdict(good.evidence, good.trust)
    dice = random.Random(6)
    for body in damaged(good.evidence.body, dice):
        found = verdict(msgspec.structs.replace(good.evidence, body=body), good.trust)
        assert isinstance(found, str) or found == truth


def test_damaged_collateral_never_says_anything_else(good: Sample) -> None:
    truth = verdict(good.evidence, good.trust)
    dice = random.Random(7)
    for name, data in good.evidence.collateral.items():
        for wrong in damaged(data, dice):
            found = verdict(with_collateral(good.evidence, name, wrong), good.trust)
            assert isinstance(found, str) or found == truth


def test_most_damage_is_refused(good: Sample) -> None:
    dice = random.Random(8)
    bodies = [flipped(good.evidence.body, dice) for _ in range(NUM_FLIPS)]
    verdicts = [verdict(msgspec.structs.replace(good.evidence, body=b), good.trust) for b in bodies]
    assert sum(isinstance(found, str) for found in verdicts) > NUM_FLIPS // 2


def test_collateral_that_is_missing_is_asked_for(good: Sample) -> None:
    # Nitro's documents carry all that their verdict needs.
    wanted = (
        Refusal.NO_COLLATERAL if good.evidence.collateral else verdict(good.evidence, good.trust)
    )
    bare = msgspec.structs.replace(good.evidence, collateral={})
    assert verdict(bare, good.trust) == wanted


def test_evidence_of_another_platform_is_refused(good: Sample) -> None:
    own = good.evidence.platform
    for name in VERIFIERS:
        # A simulated quote is a TDX quote: there the root makes the difference, below.
        if name != own and {name, own} != {Platform.SIMULATED, Platform.TDX}:
            other = msgspec.structs.replace(good.evidence, platform=Platform(name))
            assert verdict(other, good.trust) in _NOT_OURS


_NOT_OURS = {
    Refusal.OTHER_PLATFORM,
    Refusal.MALFORMED,
    Refusal.NO_COLLATERAL,
    Refusal.WRONG_ROOT,
}


def test_the_root_of_somebody_else_vouches_for_nothing(good: Sample) -> None:
    trust = Trust(at=good.at, roots={good.evidence.platform: SyntheticQuoter.create().root_pem})
    assert verdict(good.evidence, trust) == Refusal.WRONG_ROOT


def test_a_root_that_is_none_vouches_for_nothing(good: Sample) -> None:
    for pem in (b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        trust = Trust(at=good.at, roots={good.evidence.platform: pem})
        assert verdict(good.evidence, trust) in {Refusal.MALFORMED, Refusal.WRONG_ROOT}


@pytest.mark.parametrize("year", [1, 1950, 1971, 2260, 9999])
def test_any_time_gives_a_verdict(good: Sample, year: int) -> None:
    trust = Trust(at=datetime(year, 1, 2, tzinfo=UTC), roots=good.roots)
    found = verdict(good.evidence, trust)
    dated = {Refusal.EXPIRED, Refusal.NOT_YET_VALID}
    assert not isinstance(found, str) or found in dated


@pytest.mark.parametrize("platform", sorted(VERIFIERS))
@given(body=st.binary(max_size=3000), value=st.binary(max_size=300), data=st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_bytes_of_any_kind_get_a_named_refusal(
    platform: str, body: bytes, value: bytes, data: st.DataObject
) -> None:
    names = sorted({name for made in MADE for name in sample(made).evidence.collateral})
    chosen = data.draw(st.sets(st.sampled_from(names)))
    evidence = Evidence(
        platform=Platform(platform), body=body, collateral=dict.fromkeys(chosen, value)
    )
    assert isinstance(verdict(evidence, Trust(at=AT)), str)
