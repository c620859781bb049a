"""Reading a federation's store: for pages, commands and its own writer. It changes nothing."""

import json
from pathlib import Path

from cutlayer.federation.database import Database, Row, Value
from cutlayer.federation.store_rows import AttemptRow, MemberRow, MetricRow, Pinned, RoundRow
from cutlayer.model.cut import Cut

__all__ = ["StoreReader"]

_ROUND_COLUMNS = (
    "number, attempts, began_at, ended_at, seconds, cohort, survivors, stragglers, total_weight, "
    "bytes_up, bytes_down, digest, payload_digest"
)


class StoreReader:
    """Made by `FederationStore.read_only`; usable from several threads."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self.folder = folder

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @property
    def federation(self) -> str:
        """The federation's name."""
        return str(self._database.rows("SELECT name FROM federation")[0][0])

    @property
    def round(self) -> int:
        """The last finished round; 0 before the first."""
        return _int(self._database.rows("SELECT coalesce(max(number), 0) FROM rounds")[0][0])

    def pinned(self) -> Pinned | None:
        """What all members must have; None as long as nobody joined."""
        query = "SELECT fingerprint, layout, pinned_by FROM federation"
        ((fingerprint, layout, member),) = self._database.rows(query)
        if fingerprint is None:
            return None
        return Pinned(
            fingerprint=json.loads(str(fingerprint)),
            layout=json.loads(str(layout)),
            member=str(member),
        )

    def members(self) -> list[MemberRow]:
        """Everybody who ever joined, by name."""
        query = (
            "SELECT name, joined_at, left_at, last_seen, num_rounds, num_straggled "
            "FROM members ORDER BY name"
        )
        return [_member(row) for row in self._database.rows(query)]

    def cuts(self) -> dict[str, Cut]:
        """Cuts of everybody who ever joined with one of its own, by name, sorted."""
        tables = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'cuts'"
        if not self._database.rows(tables)[0][0]:
            return {}
        rows = self._database.rows("SELECT member, lower, upper FROM cuts ORDER BY member")
        return {str(member): Cut(_int(lower), _int(upper)) for member, lower, upper in rows}

    def rounds(self, last: int | None = None) -> list[RoundRow]:
        """Finished rounds, oldest first.

        Args:
            last: only so many of the newest; None gives all.
        """
        query = f"SELECT {_ROUND_COLUMNS} FROM rounds ORDER BY number DESC LIMIT ?"
        rows = self._database.rows(query, (-1 if last is None else last,))
        return [_round(row) for row in reversed(rows)]

    def round_row(self, number: int) -> RoundRow | None:
        """One finished round; None if there is none of that number."""
        query = f"SELECT {_ROUND_COLUMNS} FROM rounds WHERE number = ?"
        return next((_round(row) for row in self._database.rows(query, (number,))), None)

    def last_attempt(self, round_number: int) -> int:
        """The newest beginning of a round; 0 for none."""
        query = "SELECT coalesce(max(number), 0) FROM attempts WHERE round = ?"
        return _int(self._database.rows(query, (round_number,))[0][0])

    def attempts(self, round_number: int | None = None) -> list[AttemptRow]:
        """Beginnings of one round, or of all, oldest first."""
        query = (
            "SELECT round, number, began_at, ended_at, cohort, outcome FROM attempts "
            "WHERE ? IS NULL OR round = ? ORDER BY round, number"
        )
        return [_attempt(row) for row in self._database.rows(query, (round_number,) * 2)]

    def metric_names(self, member: str, round_number: int) -> list[str]:
        """What a member has published for a round."""
        query = "SELECT name FROM metrics WHERE round = ? AND member = ?"
        return [str(name) for (name,) in self._database.rows(query, (round_number, member))]

    def metrics(self, last: int | None = None) -> list[MetricRow]:
        """Published numbers, oldest first.

        Args:
            last: of so many of the newest rounds that have any; None gives all.
        """
        query = (
            "SELECT round, member, name, value, published_at FROM metrics WHERE round IN "
            "(SELECT DISTINCT round FROM metrics ORDER BY round DESC LIMIT ?) "
            "ORDER BY round, member, name"
        )
        rows = self._database.rows(query, (-1 if last is None else last,))
        return [
            MetricRow(
                round=_int(row[0]),
                member=str(row[1]),
                name=str(row[2]),
                value=float(row[3] or 0.0),
                published_at=str(row[4]),
            )
            for row in rows
        ]


def _member(row: Row) -> MemberRow:
    return MemberRow(
        name=str(row[0]),
        joined_at=str(row[1]),
        left_at=_text(row[2]),
        last_seen=str(row[3]),
        num_rounds=_int(row[4]),
        num_straggled=_int(row[5]),
    )


def _round(row: Row) -> RoundRow:
    return RoundRow(
        number=_int(row[0]),
        attempts=_int(row[1]),
        began_at=str(row[2]),
        ended_at=str(row[3]),
        seconds=float(row[4] or 0.0),
        cohort=json.loads(str(row[5])),
        survivors=json.loads(str(row[6])),
        stragglers=json.loads(str(row[7])),
        total_weight=_int(row[8]),
        bytes_up=_int(row[9]),
        bytes_down=_int(row[10]),
        digest=str(row[11]),
        payload_digest=str(row[12]),
    )


def _attempt(row: Row) -> AttemptRow:
    return AttemptRow(
        round=_int(row[0]),
        number=_int(row[1]),
        began_at=str(row[2]),
        ended_at=_text(row[3]),
        cohort=json.loads(str(row[4])),
        outcome=str(row[5]),
    )


def _text(value: Value) -> str | None:
    return None if value is None else str(value)


def _int(value: Value) -> int:
    assert value is not None
    return int(value)
