"""One line of a ledger: its form, what it costs, and lines of older versions.

It reads and writes no file (`ledger`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from cutlayer.errors import StorageError
from cutlayer.privacy.budget import SessionBudget
from cutlayer.privacy.mechanism import NoiseForm, PrivacyEvent, ReleaseUnit
from cutlayer.privacy.spending import Payment
from cutlayer.privacy.spent import spent_once

__all__ = [
    "LedgerLine",
    "Release",
    "line_of",
    "lost_line",
    "parse_line",
    "payment_of",
    "rule_of",
]

_DIGEST_BYTES = 16


class LedgerLine(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """One line of the file. Fields with a default are left out where they have it."""

    time: str
    """When, ISO 8601 in UTC."""
    run: str
    """Run identifier."""
    boundary: str
    """Which gate: activations, gradients or generation."""
    mechanism: str
    """Noise rule."""
    scale: float | None
    """Its scale; null where it has none."""
    version: str
    """Weights that made the vectors."""
    keys: list[str]
    """One release key per row, 32 hex digits."""
    vectors: int
    """Vectors released for these rows; replayed rows of the same frame are not in the line."""
    clip: float | None = None
    """Norm bound, in units of the activations."""
    form: NoiseForm | None = None
    """What arithmetic it follows; absent: it has no guarantee."""
    multiplier: float | None = None
    """See `NoiseForm`, of one application."""
    unit: ReleaseUnit = ReleaseUnit.VECTOR
    """What one application covers."""
    rows: list[str] = []
    """Per row its digest, 32 hex digits, the same in every version; absent: not told apart."""
    row_vectors: list[int] = []
    """Vectors of each row."""
    account: tuple[int, str] | None = None
    """Lines of the owner's account with this release, and the hash of the last one."""
    ahead: int = 0
    """Vectors that may leave by the same rule before the next line, which names those that did. In
    a ledger's last line they count as released: a crash came before their line."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """One row that is about to leave."""

    key: str
    """Release key, 32 hex digits."""
    num_vectors: int
    """Its vectors."""
    budget: SessionBudget | None = None
    """The conversation that pays for them, where one does."""
    row: str | None = None
    """Digest of the row, 32 hex digits, the same in every version; None: not told apart."""


def line_of(
    now: datetime,
    run: str,
    boundary: str,
    event: PrivacyEvent,
    version: str,
    releases: Sequence[Release],
) -> LedgerLine:
    """The line of some fresh rows.

    Args:
        now: the moment, in UTC.
        run: run identifier.
        boundary: name of the gate.
        event: noise rule; its vectors are of the whole frame and not used.
        version: weights that made the vectors.
        releases: the rows, all with a digest or none.
    """
    rows = [release.row for release in releases if release.row is not None]
    assert len(rows) in (0, len(releases)), "some rows have a digest and some have none"
    needs_vectors = bool(rows) or event.form is not None
    return LedgerLine(
        time=now.isoformat(timespec="milliseconds"),
        run=run,
        boundary=boundary,
        mechanism=event.mechanism,
        scale=event.scale,
        version=version,
        keys=[release.key for release in releases],
        vectors=sum(release.num_vectors for release in releases),
        clip=event.clip,
        form=event.form,
        multiplier=event.multiplier,
        unit=event.unit,
        rows=rows,
        row_vectors=[release.num_vectors for release in releases] if needs_vectors else [],
    )


def parse_line(record: Mapping[str, object], where: str) -> LedgerLine:
    """A line from its record.

    Raises:
        StorageError: it is not one.
    """
    try:
        line = msgspec.convert(record, LedgerLine)
        _check(line)
        return line
    except (msgspec.ValidationError, ValueError) as error:
        raise StorageError(
            f"{where} is not a ledger line: {error}; put the original file back"
        ) from error


def rule_of(line: LedgerLine) -> tuple[object, ...]:
    """What vectors have in common that one line may name."""
    return line.boundary, line.mechanism, line.scale, line.clip, line.version, line.time[:10]


def lost_line(last: LedgerLine | None) -> LedgerLine | None:
    """What has left, at most, after the last line of a ledger, if nobody closed it."""
    if last is None or not last.ahead:
        return None
    return msgspec.structs.replace(last, keys=[], vectors=last.ahead, ahead=0)


def payment_of(line: LedgerLine) -> Payment:
    """What a line costs.

    Raises:
        ConfigError: a form that no arithmetic here knows.
    """
    event = PrivacyEvent(
        mechanism=line.mechanism,
        scale=line.scale,
        num_vectors=line.vectors,
        clip=line.clip,
        form=line.form,
        multiplier=line.multiplier,
        unit=line.unit,
    )
    # Lines of before there were digests have no vectors per row either, and no guarantee.
    counts = line.row_vectors or [line.vectors]
    names: list[bytes | None] = [bytes.fromhex(row) for row in line.rows]
    return Payment(
        day=line.time[:10],
        boundary=line.boundary,
        version=line.version,
        once=spent_once(event),
        unit=line.unit,
        rows=list(zip(names or [None] * len(counts), counts, strict=True)),
    )


def _check(line: LedgerLine) -> None:
    if not all(len(bytes.fromhex(key)) == _DIGEST_BYTES for key in (*line.keys, *line.rows)):
        raise ValueError("a release key or row has 32 hex digits")
    if line.rows and len(line.rows) != len(line.row_vectors):
        raise ValueError(f"{len(line.rows)} rows and {len(line.row_vectors)} numbers of vectors")
    if line.row_vectors and sum(line.row_vectors) != line.vectors:
        raise ValueError("its rows do not add up to its vectors")
    if line.ahead and (line.ahead < 0 or line.rows or line.form is not None):
        raise ValueError("only vectors without a guarantee, of rows not told apart, go ahead")
    if line.form is not None and not line.row_vectors:
        raise ValueError("a rule with a guarantee names the vectors of each row")
