"""Cases of the table of refusals: evidence that an owner accepts, and one thing about it changed.

A base is evidence with a policy that takes it; a change makes another case of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import msgspec

from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.policy import Policy, appraise
from cutlayer.tee.refusal import Refusal
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.unit.tee.evidence_samples import Sample

__all__ = [
    "Case",
    "Change",
    "Row",
    "accepting",
    "at",
    "body",
    "bound",
    "collateral",
    "cut",
    "flip",
    "judge",
    "later",
    "named",
    "policy",
    "rooted",
    "rows",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that a verdict depends on."""

    evidence: Evidence
    at: datetime
    policy: Policy
    report_data: bytes | None
    roots: Mapping[Platform, bytes] = field(default_factory=dict)


Change = Callable[[Case], Case]
"""Another case of one."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to be wrong."""

    base: str
    what: str
    change: Change
    refusal: Refusal
    needs_published: bool
    """The samples must lie beside the checkout."""


def rows(
    base: str, *cells: tuple[str, Change, Refusal], needs_published: bool | None = None
) -> list[Row]:
    """Rows over one base."""
    needs = base.startswith("published") if needs_published is None else needs_published
    return [
        Row(base=base, what=what, change=change, refusal=name, needs_published=needs)
        for what, change, name in cells
    ]


def judge(case: Case) -> Claims:
    """The verdict, as `tee.verify.verify` finds it, with roots from memory."""
    claims = claims_of(case.evidence, Trust(at=case.at, roots=case.roots))
    appraise(claims, case.policy, case.at, case.report_data)
    return claims


def accepting(sample: Sample, *pins: str, **more: object) -> Case:
    """The case of an owner who pinned these measurements of this very evidence."""
    claims = claims_of(sample.evidence, sample.trust)
    made = Policy(
        name="table",
        platforms=[sample.evidence.platform],
        least_assurance=claims.assurance.label.lower(),
        measurements={name: [claims.measurements[name]] for name in pins},
        tcb_statuses=[claims.tcb_status],
        advisories=list(claims.advisories),
    )
    return Case(
        evidence=sample.evidence,
        at=sample.at,
        policy=_changed(made, more),
        report_data=claims.report_data or None,
        roots=sample.roots,
    )


def flip(offset: int, bit: int = 1) -> Change:
    """One bit of the body."""

    def change(case: Case) -> Case:
        data = bytearray(case.evidence.body)
        data[offset] ^= bit
        return _with(case, body=bytes(data))

    return change


def cut(num_bytes: int) -> Change:
    """The body's first bytes alone."""
    return lambda case: _with(case, body=case.evidence.body[:num_bytes])


def body(data: Callable[[], bytes]) -> Change:
    """Another body."""
    return lambda case: _with(case, body=data())


def collateral(name: str, make: Callable[[bytes], bytes] | None = None) -> Change:
    """One piece of collateral made otherwise, or left out."""

    def change(case: Case) -> Case:
        pieces = dict(case.evidence.collateral)
        old = pieces.pop(name, b"")
        if make is not None:
            pieces[name] = make(old)
        return _with(case, collateral=pieces)

    return change


def named(platform: Platform) -> Change:
    """Evidence that says it were another platform's, before a policy that wants that one."""

    def change(case: Case) -> Case:
        case = policy(platforms=[platform])(case)
        return _with(case, platform=platform)

    return change


def at(*date: int) -> Change:
    """Another time of the verdict."""
    return lambda case: replace(case, at=datetime(*date, tzinfo=case.at.tzinfo))  # type: ignore[arg-type]


def later(**amount: float) -> Change:
    """A verdict after (or, negative, before) the good one."""
    return lambda case: replace(case, at=case.at + timedelta(**amount))


def bound(report_data: bytes) -> Change:
    """Another key, nonce or spec than the evidence was made for."""
    return lambda case: replace(case, report_data=report_data)


def rooted(platform: Platform, pem: Callable[[], bytes]) -> Change:
    """Another root than the one that signed."""
    return lambda case: replace(case, roots={platform: pem()})


def policy(**changes: object) -> Change:
    """An owner who accepts something else."""
    return lambda case: replace(case, policy=_changed(case.policy, changes))


def _with(case: Case, **changes: object) -> Case:
    return replace(case, evidence=msgspec.structs.replace(case.evidence, **changes))


def _changed(old: Policy, changes: Mapping[str, object]) -> Policy:
    return Policy.model_validate(old.model_dump() | dict(changes))
