"""The gate of a re-cut: no adapter reaches the server without consent, and each is accounted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cutlayer.errors import ConfigError
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.moved_gate import MovedGate, ReleasedAdapter, _Gate
from cutlayer.storage.log import DurableLog

WEIGHTS = {"base_model.model.model.layers.1.q.lora_A.weight": torch.ones(3, 2)}
MOMENTS = {f"{key}.step": torch.tensor(4.0) for key in WEIGHTS}
NAME = "0123abcd.s20"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(DurableLog(tmp_path / "ledger.jsonl"), "run") as opened:
        yield opened


def test_a_moved_adapter_has_a_line_of_its_own_and_the_same_again_is_a_replay(
    ledger: Ledger,
) -> None:
    gate = MovedGate(ledger, shares=True)
    released = gate.release(WEIGHTS, MOMENTS, NAME)
    assert sorted(released.tensors) == [
        *(f"adapter/{key}" for key in WEIGHTS),
        *(f"moment/{key}" for key in MOMENTS),
    ]
    gate.release(WEIGHTS, MOMENTS, NAME)
    assert ledger.summary().num_vectors == {"adapters": 1}
    gate.release({key: x + 1 for key, x in WEIGHTS.items()}, MOMENTS, NAME)
    assert ledger.summary().num_vectors == {"adapters": 2}


def test_without_consent_nothing_passes_and_the_message_says_what_would_be_seen(
    ledger: Ledger,
) -> None:
    gate = MovedGate(ledger, shares=False)
    with pytest.raises(ConfigError, match=r"blocks 4, 5 .*moments.*--share-adapter"):
        gate.require_consent([4, 5])
    with pytest.raises(ConfigError, match="not accepted"):
        gate.release(WEIGHTS, MOMENTS, NAME)
    assert ledger.summary().num_lines == 0


def test_a_move_to_the_owner_needs_no_consent_and_costs_nothing(ledger: Ledger) -> None:
    gate = MovedGate(ledger, shares=False)
    gate.require_consent([])
    assert gate.release({}, {}, NAME).tensors == {}
    assert ledger.summary().num_lines == 0


def test_nobody_else_makes_what_may_be_sent() -> None:
    with pytest.raises(TypeError, match="only MovedGate"):
        ReleasedAdapter(tensors={}, gate=_Gate())
