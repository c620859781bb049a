"""A run's secret and ledger, opened together: one without the other must never be used.

It does not know mechanisms or boundaries.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cutlayer.errors import StorageError
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.noise import RunSecret
from cutlayer.storage.files import private_folder
from cutlayer.storage.log import DurableLog
from cutlayer.storage.vault import Vault

__all__ = ["LEDGER_FILE", "SECRET_FILE", "RunPrivacy", "open_run_privacy"]

SECRET_FILE = "run.secret"
LEDGER_FILE = "ledger.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunPrivacy:
    """What every boundary of a run shares."""

    secret: RunSecret
    ledger: Ledger

    def __enter__(self) -> "RunPrivacy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ledger.close()


def open_run_privacy(folder: Path, run_id: str, vault: Vault | None = None) -> RunPrivacy:
    """Open a run's secret and ledger, or make both for a new run.

    Args:
        folder: the run's private folder at the data owner.
        run_id: written into every ledger line.
        vault: encryption at rest, for both.

    Raises:
        StorageError: the ledger has lines but the secret is gone (new noise over the same data
            could be averaged away), another process writes the ledger, or a file is unreadable.
    """
    private_folder(folder)
    log = DurableLog(folder / LEDGER_FILE, vault)
    try:
        secret = _secret(folder / SECRET_FILE, log.anchor.num_lines, vault)
        return RunPrivacy(secret=secret, ledger=Ledger(log, run_id))
    except BaseException:
        log.close()
        raise


def _secret(path: Path, num_ledger_lines: int, vault: Vault | None) -> RunSecret:
    if path.exists():
        return RunSecret.load(path, vault)
    if num_ledger_lines:
        raise StorageError(
            f"{path} is missing but the run has released before: with another secret the same "
            "rows would get new noise; put the file back or start a new run"
        )
    secret = RunSecret.new()
    secret.save(path, vault)
    return secret
