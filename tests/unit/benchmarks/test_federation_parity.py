"""The parity keys of the federation benchmark, and that they can be missed."""

from pathlib import Path

import pytest
import torch

from benchmarks.parity_gradients import compare_gradients
from benchmarks.parity_losses import compare_losses
from benchmarks.parity_sums import compare_sums
from benchmarks.published_table import PUBLISHED_S, TableRow, print_published_table


def test_a_client_batch_has_the_unsplit_models_gradients(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    found = compare_gradients(tmp_path, num_clients=3)
    assert 0 < found.max_rel_diff < 1e-5
    assert len(found.updates) == 3


def test_a_federation_of_every_step_has_the_losses_of_one_model(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert compare_losses(tmp_path, num_clients=3, num_steps=4) < 1e-5


def test_secure_sums_are_plain_sums_to_their_resolution() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = {
        f"owner{n}": {"a": torch.randn(5, 3, generator=generator), "b": torch.ones(2)}
        for n in range(4)
    }
    assert 0 < compare_sums(updates) < 1e-8


def test_a_value_beyond_the_range_shows() -> None:
    updates = {f"owner{n}": {"a": torch.tensor([0.5, 100.0 * n])} for n in range(4)}
    assert compare_sums(updates) > 1.0


def test_published_factors_are_per_replica() -> None:
    rows = [TableRow(name=name, ours_s=seconds) for name, seconds in PUBLISHED_S.items()]
    factors = print_published_table(rows, "theirs against themselves")
    assert factors["client-batch 8"] == pytest.approx(1.41, abs=0.005)
    assert factors["server-hierarchical 8"] == pytest.approx(1.0, abs=0.01)
    assert factors["centralised"] == pytest.approx(1.80, abs=0.005)


def test_what_was_not_measured_has_no_factor() -> None:
    rows = [TableRow(name=name, ours_s=None) for name in PUBLISHED_S]
    assert print_published_table(rows, "nothing") == {}
