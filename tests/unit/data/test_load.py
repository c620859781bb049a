"""A whole data set: ids, split, digest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.settings import DataSettings
from cutlayer.data.template import RowLimits
from cutlayer.errors import DataError
from cutlayer.settings import parse_settings

Write = Callable[..., Path]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Dataset]:
    def load(train: Path, **more: object) -> Dataset:
        table = {"train": train, "prompt": "p", "completion": "c", "chat_template": False, **more}
        settings = parse_settings(DataSettings, table, where="run.toml")
        return load_dataset(settings, tokenizer, RowLimits(context_length=64))

    return load


def _rows(num_rows: int, text: str = "row") -> list[dict[str, str]]:
    return [{"p": f"{text} {place}", "c": f" {place}"} for place in range(num_rows)]


def test_validation_ids_go_on_after_the_training_records(
    load: Callable[..., Dataset], jsonl: Write
) -> None:
    # One id for two rows would key the same noise for both: their difference would be plain.
    train = jsonl({"p": "x" * 99, "c": "y"}, *_rows(3))
    validation = jsonl(*_rows(2), name="validation.jsonl")
    data = load(train, validation=str(validation), on_too_long="skip")
    assert [row.row_id for row in data.train] == [1, 2, 3]
    assert [row.row_id for row in data.validation] == [4, 5]
    assert data.num_skipped == 1


def test_a_split_is_fixed_by_its_seed_and_loses_no_row(
    load: Callable[..., Dataset], jsonl: Write
) -> None:
    train = jsonl(*_rows(40))
    first = load(train, validation_fraction=0.25)
    again = load(train, validation_fraction=0.25)
    other = load(train, validation_fraction=0.25, split_seed=1)
    ids = [row.row_id for row in first.validation]
    assert len(ids) == 10
    assert ids == sorted(ids)
    assert ids == [row.row_id for row in again.validation]
    assert ids != [row.row_id for row in other.validation]
    assert sorted(ids + [row.row_id for row in first.train]) == list(range(40))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(
    load: Callable[..., Dataset], jsonl: Write
) -> None:
    with pytest.raises(DataError, match=r"validation_fraction=0.9 of 2 rows leaves none"):
        load(jsonl(*_rows(2)), validation_fraction=0.9)


def test_the_digest_sees_every_change(load: Callable[..., Dataset], jsonl: Write) -> None:
    digests = {
        load(jsonl(*_rows(5))).digest,
        load(jsonl(*_rows(6))).digest,
        load(jsonl(*reversed(_rows(5)))).digest,
        load(jsonl(*_rows(5)), append_eos=False).digest,
        load(jsonl(*_rows(5, "other"))).digest,
    }
    assert len(digests) == 5
    assert load(jsonl(*_rows(5))).digest == load(jsonl(*_rows(5))).digest


def test_all_rows_skipped_is_an_error(load: Callable[..., Dataset], jsonl: Write) -> None:
    with pytest.raises(DataError, match="all 3 rows are longer than 2 tokens"):
        load(jsonl(*_rows(3)), on_too_long="skip", max_length=2)


def test_a_bad_line_far_down_is_named(load: Callable[..., Dataset], jsonl: Write) -> None:
    path = jsonl(*_rows(30), {"p": "x", "c": ["y"]})
    with pytest.raises(DataError, match=f"{path}:31: column 'c' is a list, expected text"):
        load(path)
