"""A federation's real store with a few finished rounds. It trains nothing."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import RoundRow

__all__ = ["BEGAN", "MEMBERS", "finish_round", "new_store"]

BEGAN = datetime(2026, 11, 21, 8, 0, tzinfo=UTC)
MEMBERS = ["amazon", "movies", "nyt", "tweets"]


def new_store(folder: Path, name: str = "reviews", num_rounds: int = 3) -> FederationStore:
    """Four members, `num_rounds` rounds; `tweets` misses every second one, `nyt` has left."""
    store = FederationStore(folder, name, now=lambda: BEGAN)
    for member in MEMBERS:
        store.add_member(member)
    for number in range(1, num_rounds + 1):
        finish_round(store, number)
    store.remove_member("nyt")
    return store


def finish_round(store: FederationStore, number: int) -> None:
    """A round with all who came; the second one begins twice. `amazon` publishes a loss."""
    attempt = 2 if number == 2 else 1
    for begun in range(1, attempt + 1):
        store.begin_attempt(number, begun, MEMBERS)
        if begun < attempt:
            store.fail_attempt(number, begun, "QuorumNotMet")
    late = ["tweets"] if number % 2 == 0 else []
    ended = BEGAN + timedelta(seconds=60 * number)
    row = RoundRow(
        number=number,
        attempts=attempt,
        began_at=(ended - timedelta(seconds=50)).isoformat(),
        ended_at=ended.isoformat(),
        seconds=50.0 + number,
        cohort=MEMBERS,
        survivors=[name for name in MEMBERS if name not in late],
        stragglers=late,
        total_weight=1000 * number,
        bytes_up=5000,
        bytes_down=4000,
        digest=f"{number:064x}",
        payload_digest="0" * 64,
    )
    store.commit_round(row, Checkpoint(state={"0.q.lora_A": torch.zeros(2, 3)}))
    store.publish("amazon", number, {"loss": 2.0 / number})
