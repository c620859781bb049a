"""Rounds to write into a store, and whether they came back whole."""

import torch

from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import RoundRow

__all__ = ["KEY", "checkpoint_of", "commit", "is_whole", "row_of"]

KEY = "layers.0.lora_A.weight"


def row_of(number: int, attempt: int = 1) -> RoundRow:
    return RoundRow(
        number=number,
        attempts=attempt,
        began_at="2026-11-21T00:00:00.000+00:00",
        ended_at="2026-11-21T00:00:01.000+00:00",
        seconds=1.0,
        cohort=["a", "b", "c"],
        survivors=["a", "b"],
        stragglers=["c"],
        total_weight=7,
        bytes_up=10,
        bytes_down=20,
        digest=f"{number:064x}",
        payload_digest="p",
    )


def checkpoint_of(number: int) -> Checkpoint:
    return Checkpoint(
        state={KEY: torch.full((64, 64), float(number))},
        strategy={f"{KEY}.m": torch.full((3,), float(number), dtype=torch.float64)},
    )


def commit(store: FederationStore, number: int, attempt: int = 1) -> None:
    store.begin_attempt(number, attempt, ["a", "b", "c"])
    store.commit_round(row_of(number, attempt), checkpoint_of(number))


def is_whole(store: FederationStore, acknowledged: int) -> bool:
    """Every acknowledged round is there, at most one more, and the newest is as it was written."""
    last, checkpoint = store.round, store.checkpoint()
    numbers = [row.number for row in store.rounds()]
    if not acknowledged <= last <= acknowledged + 1 or numbers != list(range(1, last + 1)):
        return False
    if any(row.outcome not in ("finished", "void") for row in store.attempts()):
        return False
    if checkpoint is None:
        return last == 0
    wanted = checkpoint_of(last)
    return torch.equal(checkpoint.state[KEY], wanted.state[KEY]) and torch.equal(
        checkpoint.strategy[f"{KEY}.m"], wanted.strategy[f"{KEY}.m"]
    )
