"""The shared numbers are the product's own settings, and mean the same to every method."""

from pathlib import Path

import msgspec
import pytest

from cutlayer.client.schedule import batch_plan as client_plan
from cutlayer.client.schedule import learning_rate
from cutlayer.data.load import Dataset
from cutlayer.data.template import Example
from cutlayer.errors import ConfigError
from cutlayer.suite.recipe import (
    MAX_LENGTH,
    NUM_VIRTUAL_TOKENS,
    adapter_settings,
    batch_plan,
    max_length,
    open_model,
    train_settings,
)
from cutlayer.suite.spec import Method, RunSpec, Sizes
from tests.tiny_models import tiny_llama_folder

SIZES = Sizes(train_rows=7, test_rows=4, steps=5, rows_per_step=3, micro_batch_rows=2, lr=2e-3)
SPEC = RunSpec(task="topics", method=Method.SPLIT, seed=3, sizes=SIZES)


def test_the_order_of_rows_is_the_one_that_a_client_takes() -> None:
    rows = [Example([1, 2], [-100, 2], row) for row in range(7)]
    theirs = client_plan(Dataset(train=rows, validation=[], num_skipped=0), train_settings(SPEC))
    ours = batch_plan(SPEC, len(rows))
    assert ours.num_steps == theirs.num_steps == 5
    steps = range(5)
    assert [ours.micro_batches(s) for s in steps] == [theirs.micro_batches(s) for s in steps]


def test_another_seed_has_another_order_and_other_fresh_weights() -> None:
    other = msgspec.structs.replace(SPEC, seed=4)
    assert batch_plan(SPEC, 7).rows_of(0) != batch_plan(other, 7).rows_of(0)
    assert adapter_settings(SPEC).seed != adapter_settings(other).seed


def test_the_learning_rate_never_changes() -> None:
    settings = train_settings(SPEC)
    assert {learning_rate(step, 5, settings) for step in range(1, 6)} == {SIZES.lr}


def test_a_step_never_has_more_rows_than_there_are() -> None:
    assert batch_plan(SPEC, 2).rows_of(4) in {(0, 1), (1, 0)}


def test_a_prefix_takes_its_positions_from_the_rows() -> None:
    prefix = msgspec.structs.replace(SPEC, adapter="prefix")
    assert max_length(SPEC, 128) == 128
    assert max_length(prefix, 128) == 128 - NUM_VIRTUAL_TOKENS
    assert max_length(prefix, 10 * MAX_LENGTH) == MAX_LENGTH


def test_an_unknown_kind_of_adapter_is_named_with_those_that_exist() -> None:
    wrong = msgspec.structs.replace(SPEC, adapter="lorra")
    with pytest.raises(ConfigError, match="'lorra' is unknown; choose one of lora, prefix"):
        adapter_settings(wrong)


def test_a_model_is_found_by_its_folder(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    found = open_model(msgspec.structs.replace(SPEC, model=str(folder)), None)
    assert found.path == folder


def test_an_asset_that_does_not_exist_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        open_model(msgspec.structs.replace(SPEC, model="asset:nonsense"), tmp_path)
