"""The gate of a federation: what leaves is in the ledger first, and once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cutlayer.errors import ConfigError
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.update_gate import UpdateGate
from cutlayer.storage.log import DurableLog

NAME = "trial.r1.a1"
UPDATE = {"layers.0.lora_B": torch.ones(3, 2)}
MASKED_M = torch.arange(7)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(DurableLog(tmp_path / "ledger.jsonl"), "run") as opened:
        yield opened


def _lines(ledger: Ledger) -> dict[str, int]:
    return dict(ledger.summary().num_vectors)


def test_the_same_again_is_a_replay_and_other_content_is_not(ledger: Ledger) -> None:
    """A coordinator that was set back uses the name of a round's attempt a second time."""
    gate = UpdateGate(ledger, allows_plain=True, publishes=True)
    for _ in range(2):
        gate.masked(MASKED_M, NAME)
        gate.metrics({"loss": 1.5}, NAME)
    assert _lines(ledger) == {"updates": 1, "metrics": 1}
    gate.masked(MASKED_M + 1, NAME)
    gate.masked(MASKED_M + 1, NAME, sealed=b"state")
    gate.plain(UPDATE, NAME)
    gate.metrics({"loss": 1.25}, NAME)
    assert _lines(ledger) == {"updates": 4, "metrics": 2}


def test_what_the_owner_did_not_accept_leaves_no_line(ledger: Ledger) -> None:
    gate = UpdateGate(ledger, allows_plain=False, publishes=False)
    with pytest.raises(ConfigError, match="share_plain_updates"):
        gate.plain(UPDATE, NAME)
    assert gate.metrics({"loss": 1.5}, NAME) is None
    assert _lines(ledger) == {}
