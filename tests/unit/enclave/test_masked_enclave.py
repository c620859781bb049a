"""An enclave whose frozen layers run masked on an accelerator: Methods 1 and 2 together."""

from pathlib import Path

import pytest

from tests.enclave_worlds import enclave_settings, owner_of, owner_settings, running_enclave
from tests.masked_worlds import running_workers


def test_a_masked_enclave_trains_like_a_plain_one(tmp_path: Path, model: Path) -> None:
    losses = {}
    with running_workers(tmp_path) as (accelerator, dealer, key):
        masked = {
            "accelerator": accelerator,
            "dealer": dealer,
            "dealer_key": key,
            "allow_same_machine": True,
        }
        for name, changes in (("plain", {}), ("masked", {"masked": masked})):
            settings = owner_settings(
                model, tmp_path / name, train__steps=2, train__rows_per_step=4
            )
            with (
                running_enclave(enclave_settings(model, tmp_path / name, **changes)) as server,
                owner_of(server, settings) as owner,
            ):
                losses[name] = [record.loss for record in owner.train().history]
    assert losses["masked"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["masked"] != losses["plain"]
