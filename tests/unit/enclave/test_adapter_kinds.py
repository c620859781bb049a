"""Every kind of adapter learns inside, with its prefixes, heads and rows where the blocks are."""

from pathlib import Path

import pytest
import torch

from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import ConfigError
from tests.enclave_worlds import enclave_settings, owner_of, owner_settings, running_enclave

KINDS = [["prefix"], ["lora", "sparse"]]


@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_every_kind_learns_and_generates(tmp_path: Path, model: Path, kinds: list[str]) -> None:
    adapter = {"kinds": kinds, "rank": 4, "alpha": 8}
    settings = owner_settings(model, tmp_path / "a", adapter=adapter, train__steps=3)
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        owner_of(server, settings) as owner,
    ):
        before = owner.score([[70, 80, 90]])
        losses = [record.loss for record in owner.train().history]
        state = owner.enclave.pull_adapter(owner.run_id, 3)
        after = owner.score([[70, 80, 90]])
        if "prefix" in kinds:
            with pytest.raises(ConfigError, match="a prefix cannot be exported from here"):
                owner.export(tmp_path / "out")
        else:
            owner.export(tmp_path / "out")
            assert list((tmp_path / "out").rglob("*.safetensors"))
        assert len(owner.generate_ids([[70, 80]], SamplingSettings(max_new_tokens=4))[0]) == 4
    assert losses[-1] < losses[0]
    assert not torch.equal(before, after)
    assert state
    assert not any(".layers.0." in key for key in state)
