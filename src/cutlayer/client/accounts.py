"""The owner's account as a client's settings want it, and which releases concern every row.

It keeps nothing (`privacy.account`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from cutlayer.client.run_file import deepest_head
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Part
from cutlayer.privacy.account import ACCOUNT_FILE, OwnerAccount
from cutlayer.privacy.budget import BudgetedBoundary
from cutlayer.privacy.hop_names import at_hop
from cutlayer.privacy.ledger_line import LedgerLine, lost_line, parse_line, payment_of
from cutlayer.privacy.report import PrivacyReport, budget_states, privacy_report
from cutlayer.privacy.run_privacy import LEDGER_FILE, RunPrivacy
from cutlayer.privacy.spending import BoundaryTotals, RunSpending
from cutlayer.storage.log import read_log
from cutlayer.storage.vault import Vault, open_run_vault, open_vault

__all__ = [
    "account_path",
    "check_gradients",
    "keep_account",
    "renew_account",
    "report_from_files",
    "report_of_run",
    "shared_boundaries",
]


def account_path(settings: ClientSettings) -> Path:
    """Where the account lies: never inside a run folder, which a purge empties.

    Raises:
        ConfigError: the setting points into the run folder.
    """
    folder, given = settings.run.folder, settings.privacy.account_file
    path = folder.parent / ACCOUNT_FILE if given is None else given
    if path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"privacy.account_file={path} lies in the run folder {folder} and would go with it; "
            "choose a path outside"
        )
    return path


def shared_boundaries(settings: ClientSettings) -> frozenset[str]:
    """Boundaries at which every release depends on all rows.

    A gradient depends on the tail's weights, which learn from all rows; head outputs do so where
    the head has blocks and trains. With a keep_share the labels of all rows choose what of each
    row leaves.
    """
    shared = {str(BudgetedBoundary.GRADIENTS)}
    if settings.privacy.keep_share > 0:
        shared.add(str(BudgetedBoundary.ACTIVATIONS))
    head_trains = Part.HEAD in settings.adapter.parts
    if head_trains and max(settings.model.lower, deepest_head(settings.run)) > 0:
        shared |= {str(BudgetedBoundary.ACTIVATIONS), str(BudgetedBoundary.GENERATION)}
    return frozenset(shared | _shared_at_hops(settings, shared))


def _shared_at_hops(settings: ClientSettings, first: set[str]) -> set[str]:
    """What a later hop is given went through the hops before it, which learn from all rows."""
    names = set(BudgetedBoundary) if Part.TRUNK in settings.adapter.parts else first
    hops = range(2, len(settings.hops) + 1)
    return {at_hop(str(name), hop) for name in names for hop in hops}


def keep_account(settings: ClientSettings, run: RunPrivacy) -> None:
    """Let the account see every release of a run from now on.

    It is kept where an epsilon exists or a budget is set, and also where the file is there already,
    so that a run without noise does not go unseen by the others' budgets.

    Raises:
        StorageError: account or ledger was edited, cut back, removed or replaced.
    """
    if run.ledger.is_guarded:
        return
    privacy, path = settings.privacy, account_path(settings)
    rules = (privacy.activation_rule(), privacy.gradient_rule())
    has_epsilon = any(rule.event(1).form is not None for rule in rules)
    if has_epsilon or privacy.budget.limits or privacy.account_file or path.exists():
        run.ledger.guarded_by(OwnerAccount(path, privacy.budget, shared_boundaries(settings)))


def renew_account(settings: ClientSettings, run: RunPrivacy) -> None:
    """After a re-cut other releases concern every row: an account that is asked hears of it.

    Raises:
        StorageError: as `keep_account`.
    """
    if run.ledger.is_guarded:
        budget, shared = settings.privacy.budget, shared_boundaries(settings)
        run.ledger.guarded_by(OwnerAccount(account_path(settings), budget, shared))


def check_gradients(settings: ClientSettings) -> None:
    """Refuse a training run that would break its own budget with its first gradient.

    Raises:
        ConfigError: gradients, or their exact norm, will leave without a guarantee under a budget
            in epsilon.
    """
    budget, parts, train = settings.privacy.budget, settings.adapter.parts, settings.train
    if not budget.limits or not budget.covers(BudgetedBoundary.GRADIENTS):
        return
    if train is not None and train.clip_norm is not None:
        raise ConfigError(
            "privacy.budget keeps an epsilon and train.clip_norm tells the server the exact "
            "gradient norm of every step, which no epsilon covers: set train.clip_norm = 0"
        )
    leave = Part.TRUNK in parts or (Part.HEAD in parts and settings.model.lower > 0)
    if leave and settings.privacy.gradient_rule().event(1).form is None:
        raise ConfigError(
            "privacy.budget keeps an epsilon and gradients leave with "
            f"{settings.privacy.gradient_rule().guarantee!r}, through which labels leak: set "
            "privacy.gradient_mechanism to one that clips, train the tail alone "
            '(adapter.parts = ["tail"]), or say with privacy.budget.boundaries that gradients do '
            "not count"
        )


def report_from_files(settings: ClientSettings) -> PrivacyReport:
    """What a run has told so far; another process may be using it meanwhile.

    Raises:
        ConfigError: there is no such run.
        StorageError: a file cannot be read or trusted.
    """
    folder = settings.run.folder
    if not (folder / LEDGER_FILE).exists():
        raise ConfigError(f"{folder} holds no run (no {LEDGER_FILE}); check run.folder")
    vault = open_run_vault(folder, open_vault(settings.run.key_file))
    spending, num_vectors, run = RunSpending(), Counter[str](), ""
    for line in _lines(folder / LEDGER_FILE, vault):
        spending.take(spending.after(payment_of(line)))
        num_vectors[line.boundary] += line.vectors
        run = line.run
    return _report(settings, spending.boundaries(), num_vectors, run, is_tight=True)


def _lines(path: Path, vault: Vault) -> Iterator[LedgerLine]:
    """All that a ledger counts."""
    line: LedgerLine | None = None
    for number, record in enumerate(read_log(path, vault)):
        line = parse_line(record, f"{path} line {number + 1}")
        yield line
    if lost := lost_line(line):
        yield lost


def report_of_run(settings: ClientSettings, run: RunPrivacy, run_id: str) -> PrivacyReport:
    """What an open run has told so far, by the fast accountant.

    Args:
        settings: the client's.
        run: its open secret and ledger.
        run_id: its identifier.
    """
    ledger = run.ledger
    vectors = ledger.summary().num_vectors
    return _report(settings, ledger.spending(), vectors, run_id, is_tight=False)


def _report(
    settings: ClientSettings,
    totals: Mapping[str, BoundaryTotals],
    num_vectors: Mapping[str, int],
    run_id: str,
    is_tight: bool,
) -> PrivacyReport:
    budget, shared = settings.privacy.budget, shared_boundaries(settings)
    path, today = account_path(settings), datetime.now(UTC).date().isoformat()
    account = OwnerAccount(path, budget, shared) if budget.limits and path.exists() else None
    states = budget_states(account, budget, run_id, today)
    return privacy_report(
        totals, num_vectors, shared, budget.delta, budgets=states, is_tight=is_tight
    )
