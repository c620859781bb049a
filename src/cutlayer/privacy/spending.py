"""What a run has spent at each boundary, for each unit: over the run, and over its last UTC day.

Pure arithmetic over ledger lines: no file, no epsilon, no limit (`ledger`, `epsilon`, `account`).

Units: a token vector pays for its own releases, a row for those of all its vectors, the client for
everything. Rows are told apart by their digests. Where a line names none (generation: conversations
are not told apart) a row counts as the whole client, and a vector as released once for each
version of the weights: with one version the same vector only replays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cutlayer.privacy.accountant import applications
from cutlayer.privacy.guarantee import PrivacyUnit
from cutlayer.privacy.mechanism import ReleaseUnit
from cutlayer.privacy.spent import NOTHING, Spent, larger

__all__ = ["BoundaryTotals", "Payment", "RunSpending", "Staged", "Totals"]


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The worst of each unit."""

    vector: Spent = NOTHING
    """The token vector that was released most."""
    row: Spent = NOTHING
    """The row that was released most."""
    client: Spent = NOTHING
    """All of it."""

    def of(self, unit: PrivacyUnit) -> Spent:
        """The total of one unit."""
        return {
            PrivacyUnit.VECTOR: self.vector,
            PrivacyUnit.ROW: self.row,
            PrivacyUnit.CLIENT: self.client,
        }[unit]

    def with_shared_rows(self) -> "Totals":
        """Where all releases depend on every row."""
        return Totals(vector=self.vector, row=self.client, client=self.client)

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            vector=self.vector + other.vector,
            row=self.row + other.row,
            client=self.client + other.client,
        )

    def minus(self, other: "Totals") -> "Totals":
        """What of this is not in the other."""
        return Totals(
            vector=self.vector.minus(other.vector),
            row=self.row.minus(other.row),
            client=self.client.minus(other.client),
        )


@dataclass(frozen=True, kw_only=True)
class Payment:
    """The fresh rows of one release."""

    day: str
    """UTC date, ISO 8601."""
    boundary: str
    version: str
    """Weights that made the vectors."""
    once: Spent
    """What one application of the rule costs."""
    unit: ReleaseUnit
    """What one application covers."""
    rows: Sequence[tuple[bytes | None, int]]
    """Per row its digest, None where rows are not told apart, and its vectors."""


@dataclass(frozen=True, kw_only=True)
class BoundaryTotals:
    """One boundary of one run."""

    ever: Totals
    today: Totals
    """On the day of the last release at any boundary."""
    day: str


@dataclass(frozen=True, slots=True)
class _Row:
    row: Spent = NOTHING
    vector: Spent = NOTHING


@dataclass(kw_only=True)
class _Tally:
    """One boundary, over one stretch of time."""

    totals: Totals = Totals()
    rows: dict[bytes, _Row] = field(default_factory=dict)
    versions: set[tuple[str, Spent]] = field(default_factory=set)
    unnamed: Spent = NOTHING
    """A vector of the rows that are not told apart."""

    def after(self, payment: Payment) -> "_Change":
        """What a payment changes; nothing is changed yet."""
        once, totals = payment.once, self.totals
        row, vector, rows = totals.row, totals.vector, dict[bytes, _Row]()
        counts = [(name, applications(payment.unit, n)) for name, n in payment.rows]
        for name, count in counts:
            if name is not None:
                old = rows.get(name) or self.rows.get(name, _Row())
                # Without a guarantee there is nothing to tell apart, so no memory for it either.
                new = _Row(old.row + once.times(count), old.vector + once)
                if not once.is_unbounded:
                    rows[name] = new
                row, vector = larger(row, new.row), larger(vector, new.vector)
        client = totals.client + once.times(sum(count for _, count in counts))
        unnamed, version = self.unnamed, (payment.version, once)
        if any(name is None for name, _ in counts):
            unnamed = unnamed if version in self.versions else unnamed + once
            row, vector = client, larger(vector, unnamed)
        return _Change(
            totals=Totals(vector=vector, row=row, client=client),
            rows=rows,
            version=version,
            unnamed=unnamed,
        )

    def take(self, change: "_Change") -> None:
        self.totals, self.unnamed = change.totals, change.unnamed
        self.rows.update(change.rows)
        self.versions.add(change.version)


@dataclass(frozen=True, kw_only=True)
class _Change:
    totals: Totals
    rows: Mapping[bytes, _Row]
    version: tuple[str, Spent]
    unnamed: Spent


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A payment that was computed and not taken."""

    boundary: str
    day: str
    ever: _Change
    today: _Change
    is_nothing: bool
    """No vector is paid for: taken, it changes nothing."""

    @property
    def totals(self) -> BoundaryTotals:
        """The boundary's totals once it is taken."""
        return BoundaryTotals(ever=self.ever.totals, today=self.today.totals, day=self.day)


class RunSpending:
    """All boundaries of one run."""

    def __init__(self) -> None:
        """Nothing has been spent."""
        self._ever: dict[str, _Tally] = {}
        self._today: dict[str, _Tally] = {}
        self._day = ""

    def after(self, payment: Payment) -> Staged:
        """Compute a payment; a clock that was set back stays on the later day."""
        boundary, day = payment.boundary, max(self._day, payment.day)
        today = self._today.get(boundary) if day == self._day else None
        return Staged(
            boundary=boundary,
            day=day,
            ever=self._ever.get(boundary, _Tally()).after(payment),
            today=(today or _Tally()).after(payment),
            is_nothing=not any(count for _, count in payment.rows),
        )

    def take(self, staged: Staged) -> None:
        """Count what `after` computed; nothing else may have been taken in between."""
        if staged.is_nothing:
            return
        if staged.day != self._day:
            self._day, self._today = staged.day, {}
        self._ever.setdefault(staged.boundary, _Tally()).take(staged.ever)
        self._today.setdefault(staged.boundary, _Tally()).take(staged.today)

    def boundaries(self) -> dict[str, BoundaryTotals]:
        """Totals of every boundary that released something."""
        return {
            name: BoundaryTotals(
                ever=tally.totals,
                today=self._today[name].totals if name in self._today else Totals(),
                day=self._day,
            )
            for name, tally in self._ever.items()
        }
