"""Keys reach the accepted place alone, for one job and for a time."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from cutlayer.errors import AttestationError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Platform
from cutlayer.tee.exhibit import Side
from cutlayer.tee.key_release import (
    Accepted,
    Grant,
    SealedKey,
    SealingKey,
    adapter_job,
    measurement_digest,
    named_job,
    release,
)
from cutlayer.tee.verify import AttestationResult

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
SOON = AT + timedelta(minutes=10)
KEY = bytes(range(32))
JOB = adapter_job("clinic")
MEASURED = {"mr_td": "aa" * 48}


def place(receiver: SealingKey, side: Side = Side.SERVER) -> Accepted:
    """Whose evidence was accepted."""
    claims = Claims(
        platform=Platform.SIMULATED,
        assurance=Assurance.SIMULATED,
        measurements=MEASURED,
        report_data=b"",
        is_debug=False,
        tcb_status="UpToDate",
    )
    result = AttestationResult(claims=claims, policy="p", policy_digest="d", at=AT)
    return Accepted(result=result, side=side, sealing_key=receiver.public)


def test_the_accepted_place_opens_its_key() -> None:
    receiver = SealingKey()
    sealed = release(KEY, place(receiver), JOB, SOON)
    assert receiver.open(sealed, Side.SERVER, JOB, AT, measurement_digest(MEASURED)) == KEY
    assert KEY not in sealed


def test_two_releases_of_one_key_look_different() -> None:
    receiver = SealingKey()
    assert release(KEY, place(receiver), JOB, SOON) != release(KEY, place(receiver), JOB, SOON)


@pytest.mark.parametrize(
    ("side", "job", "at", "measured", "refusal"),
    [
        (Side.CLIENT, JOB, AT, None, "wrong-binding"),
        (Side.SERVER, adapter_job("bank"), AT, None, "wrong-binding"),
        (Side.SERVER, named_job("clinic"), AT, None, "wrong-binding"),
        (Side.SERVER, JOB, SOON + timedelta(seconds=1), None, "expired"),
        (Side.SERVER, JOB, AT, "00" * 32, "wrong-measurement"),
    ],
)
def test_another_side_job_time_or_software_does_not_open_it(
    side: Side, job: str, at: datetime, measured: str | None, refusal: str
) -> None:
    receiver = SealingKey()
    sealed = release(KEY, place(receiver), JOB, SOON)
    with pytest.raises(AttestationError) as caught:
        receiver.open(sealed, side, job, at, measured)
    assert caught.value.refusal == refusal


def test_another_place_does_not_open_it() -> None:
    sealed = release(KEY, place(SealingKey()), JOB, SOON)
    with pytest.raises(AttestationError, match="sealed to another place"):
        SealingKey().open(sealed, Side.SERVER, JOB, AT)


@pytest.mark.parametrize(
    "changes",
    [
        {"side": Side.CLIENT},
        {"job": adapter_job("bank")},
        {"expires_at_s": 1 << 40},
        {"measurement": "00" * 32},
    ],
)
def test_a_grant_that_was_changed_on_the_way_opens_nothing(changes: dict[str, object]) -> None:
    receiver = SealingKey()
    found = msgspec.msgpack.decode(release(KEY, place(receiver), JOB, SOON), type=SealedKey)
    grant = msgspec.structs.replace(found.grant, **changes)
    forged = msgspec.msgpack.encode(SealedKey(grant=grant, sealed=found.sealed))
    with pytest.raises(AttestationError, match="changed on the way"):
        receiver.open(forged, grant.side, grant.job, AT)


def test_rubbish_is_named_whatever_it_is() -> None:
    receiver = SealingKey()
    sealed = release(KEY, place(receiver), JOB, SOON)
    flips = [sealed[:i] + bytes([sealed[i] ^ 0x41]) + sealed[i + 1 :] for i in range(len(sealed))]
    for data in [b"", b"\xc1", bytes(5000), sealed[:-1], *flips]:
        with pytest.raises(AttestationError):
            receiver.open(data, Side.SERVER, JOB, AT)


def test_far_away_times_do_not_break_the_message() -> None:
    receiver = SealingKey()
    grant = Grant(measurement="", side=Side.SERVER, job=JOB, expires_at_s=-(1 << 62))
    data = msgspec.msgpack.encode(SealedKey(grant=grant, sealed=b""))
    with pytest.raises(AttestationError, match="until 1970"):
        receiver.open(data, Side.SERVER, JOB, AT)


def test_a_point_that_is_no_key_is_refused() -> None:
    to = Accepted(result=place(SealingKey()).result, side=Side.SERVER, sealing_key=bytes(32))
    with pytest.raises(AttestationError, match="cannot be sealed to"):
        release(KEY, to, JOB, SOON)


def test_no_key_is_shown_by_its_repr() -> None:
    receiver = SealingKey()
    assert receiver._private.private_bytes_raw().hex() not in repr(receiver)
