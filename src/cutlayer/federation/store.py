"""The federation on disk: rounds, members, metrics in sqlite (WAL), states in safetensors files.

It decides nothing (`coordinator`). A round is finished when its row is: the checkpoint's files are
written and synced first, then one transaction makes the round current. Files of a round without a
row are removed when the store is opened. The folder is private; names, times and digests are plain
in it, states are sealed where there is a vault.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from cutlayer.canonical import canonical_json
from cutlayer.errors import StorageError
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.database import Database, Value, WriterLock
from cutlayer.federation.store_reader import StoreReader
from cutlayer.federation.store_rows import Pinned, RoundRow
from cutlayer.model.cut import Cut
from cutlayer.storage.files import private_folder
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import Vault

__all__ = ["FederationStore"]

NUM_KEPT = 3
"""Newest checkpoints that stay."""


class FederationStore(StoreReader):
    """The one writer of a federation's folder; it reads too."""

    def __init__(
        self,
        folder: Path,
        federation: str,
        vault: Vault | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open or create; what a crash left half-done is removed.

        Args:
            folder: private folder of this federation alone.
            federation: its name.
            vault: seals the states; None writes them plain.
            now: wall clock, timezone-aware.

        Raises:
            StorageError: another process writes it, it is another federation's, or damaged.
        """
        self._now = now
        private_folder(folder)
        self._writer_lock = WriterLock(folder)
        try:
            super().__init__(Database(folder / "federation.sqlite", is_reader=False), folder)
            self._check_name(federation)
            self._checkpoints = StepStore(folder / "checkpoints", vault, NUM_KEPT)
            self._settle()
        except BaseException:
            self._writer_lock.release()
            raise

    @staticmethod
    def read_only(folder: Path) -> StoreReader:
        """Look at a store, also while its writer lives.

        Raises:
            StorageError: the folder holds no federation.
        """
        return StoreReader(Database(folder / "federation.sqlite", is_reader=True), folder)

    def __enter__(self) -> "FederationStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        super().close()
        self._writer_lock.release()

    def pin(self, pinned: Pinned) -> None:
        """Keep what the first member brought."""
        with self._database.transaction() as cursor:
            cursor.execute(
                "UPDATE federation SET fingerprint = ?, layout = ?, pinned_by = ?",
                (_json(pinned.fingerprint), _json(pinned.layout), pinned.member),
            )

    def unpin(self) -> None:
        """Forget it: no round was finished, and nobody is left."""
        with self._database.transaction() as cursor:
            cursor.execute("UPDATE federation SET fingerprint = NULL, layout = NULL")

    def keep_policy(self, fixed: Mapping[str, object]) -> None:
        """Remember the settings that must not change once rounds are finished.

        Raises:
            StorageError: they did.
        """
        text = _json(fixed)
        ((before,),) = self._database.rows("SELECT policy FROM federation")
        if self.round and before is not None and before != text:
            old = json.loads(str(before))
            known = fixed.keys() | old.keys()
            changed = sorted(key for key in known if fixed.get(key) != old.get(key))
            raise StorageError(
                f"{self.folder} holds {self.round} rounds made with other settings: "
                f"{', '.join(f'federation.{key}' for key in changed)}; set them back, or begin a "
                "federation of another name"
            )
        with self._database.transaction() as cursor:
            cursor.execute("UPDATE federation SET policy = ?", (text,))
            if before is not None and _is_mixed(before) != fixed.get("mixed_cuts"):
                # Nobody has trained yet, and what the first member brought says its cut, or not.
                cursor.execute("UPDATE federation SET fingerprint = NULL, layout = NULL")

    def add_member(self, name: str) -> None:
        """A member joins, for the first time or again."""
        with self._database.transaction() as cursor:
            cursor.execute(
                "INSERT INTO members (name, joined_at, last_seen) VALUES (?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET left_at = NULL, last_seen = excluded.last_seen",
                (name, self.time(), self.time()),
            )

    def keep_cut(self, member: str, cut: Cut) -> None:
        """A member's cut, instead of the one before."""
        with self._database.transaction() as cursor:
            cursor.execute(
                "INSERT OR REPLACE INTO cuts VALUES (?, ?, ?)", (member, cut.lower, cut.upper)
            )

    def remove_member(self, name: str) -> None:
        """A member leaves; its row stays."""
        with self._database.transaction() as cursor:
            cursor.execute("UPDATE members SET left_at = ? WHERE name = ?", (self.time(), name))

    def touch(self, names: Iterable[str]) -> None:
        """These members were heard of just now."""
        rows = [(self.time(), name) for name in names]
        with self._database.transaction() as cursor:
            cursor.executemany("UPDATE members SET last_seen = ? WHERE name = ?", rows)

    def begin_attempt(self, round_number: int, number: int, cohort: Sequence[str]) -> None:
        """Note a beginning before anybody hears of it: its number must never name two."""
        with self._database.transaction() as cursor:
            cursor.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, NULL, ?, 'running')",
                (round_number, number, self.time(), _json(list(cohort))),
            )

    def fail_attempt(self, round_number: int, number: int, reason: str) -> None:
        """The attempt will not become a round."""
        with self._database.transaction() as cursor:
            cursor.execute(
                "UPDATE attempts SET ended_at = ?, outcome = ? WHERE round = ? AND number = ?",
                (self.time(), reason, round_number, number),
            )

    def commit_round(
        self, row: RoundRow, checkpoint: Checkpoint, outcome: str = "finished"
    ) -> None:
        """Make a round current, whole or not at all; durable when this returns.

        Args:
            row: the round; `attempts` is the number of the attempt that succeeded.
            checkpoint: the state after it.
            outcome: of that attempt.

        Raises:
            StorageError: full disk or no permission; the round before is still current.
        """
        assert row.number == self.round + 1, f"round {row.number} after {self.round}"
        self._checkpoints.save(row.number, checkpoint.files())
        values = {key: _plain(value) for key, value in asdict(row).items()}
        with self._database.transaction() as cursor:
            marks = ", ".join(f":{key}" for key in values)
            cursor.execute(f"INSERT INTO rounds ({', '.join(values)}) VALUES ({marks})", values)
            cursor.execute(
                "UPDATE attempts SET ended_at = ?, outcome = ? WHERE round = ? AND number = ?",
                (row.ended_at, outcome, row.number, row.attempts),
            )
            for column, names in (("num_rounds", row.survivors), ("num_straggled", row.stragglers)):
                cursor.executemany(
                    f"UPDATE members SET {column} = {column} + 1 WHERE name = ?",
                    [(name,) for name in names],
                )

    def publish(self, member: str, round_number: int, metrics: Mapping[str, float]) -> None:
        """Keep numbers that an owner chose to show; the same name again replaces the value."""
        rows = [(round_number, member, k, v, self.time()) for k, v in metrics.items()]
        with self._database.transaction() as cursor:
            cursor.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?)", rows)

    def checkpoint(self) -> Checkpoint | None:
        """The state after the last finished round; None before the first.

        Raises:
            StorageError: it is missing or damaged, or sealed with another key.
        """
        if self.round == 0:
            return None
        return Checkpoint.of_files(self._checkpoints.load(self.round))

    def time(self) -> str:
        """Now, as the store writes it."""
        return self._now().astimezone(UTC).isoformat(timespec="milliseconds")

    def _check_name(self, federation: str) -> None:
        names = self._database.rows("SELECT name FROM federation")
        if not names:
            with self._database.transaction() as cursor:
                cursor.execute(
                    "INSERT INTO federation (name, created_at) VALUES (?, ?)",
                    (federation, self.time()),
                )
        elif names != [(federation,)]:
            raise StorageError(
                f"{self.folder} is the store of federation {names[0][0]}, not of {federation}; "
                "give each federation a folder of its own"
            )

    def _settle(self) -> None:
        self._checkpoints.drop_after(self.round)
        with self._database.transaction() as cursor:
            cursor.execute(
                "UPDATE attempts SET ended_at = ?, outcome = 'void' WHERE outcome = 'running'",
                (self.time(),),
            )
        if self.round and self.round not in self._checkpoints.steps():
            raise StorageError(
                f"{self.folder} has no files of round {self.round}, its last one; restore the "
                "whole folder from a copy"
            )


def _is_mixed(policy: Value) -> object:
    return json.loads(str(policy)).get("mixed_cuts")


def _json(value: object) -> str:
    return canonical_json(value).decode()


def _plain(value: object) -> str | int | float | None:
    if isinstance(value, list):
        return _json(value)
    assert value is None or isinstance(value, str | int | float)
    return value
