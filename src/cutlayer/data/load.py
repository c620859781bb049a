"""The owner's files as training and validation rows: read, template, split.

It does not batch. Rows are kept in memory as token ids; the text is not.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cutlayer.data.batches import shuffled
from cutlayer.data.settings import DataSettings
from cutlayer.data.sources import read_records
from cutlayer.data.telling import mark_withheld
from cutlayer.data.template import Example, RowLimits, RowMaker, Tokenizer
from cutlayer.errors import DataError

__all__ = ["Dataset", "dataset_digest", "load_dataset"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """All rows of one owner."""

    train: list[Example] = field(repr=False)
    """Rows to train on, in file order."""
    validation: list[Example] = field(repr=False)
    """Rows to validate on, in file order; may be empty."""
    num_skipped: int
    """Records that were too long and skipped, as the settings said."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything, in hex; a resumed run compares it. It stays at the owner."""
        return dataset_digest([*self.train, *self.validation])


def load_dataset(
    settings: DataSettings, tokenizer: Tokenizer, limits: RowLimits, keep_share: float = 0.0
) -> Dataset:
    """Read, template and split everything the settings name.

    Args:
        settings: files and form.
        tokenizer: the model's.
        limits: what the model can take.
        keep_share: private tokens of a row that may leave where the others stay.

    Raises:
        ConfigError: the settings do not fit the tokenizer or the model.
        DataError: a file or a record is wrong; the message names file and line.
    """
    maker = RowMaker(settings, tokenizer, limits)
    train, num_train = _load(settings.train, "train", settings, maker, first_row_id=0)
    validation: list[Example] = []
    num_records = num_train
    if settings.validation is not None:
        # Ids go on after the training records: one id is one noise stream, never two rows.
        validation, num_validation = _load(
            settings.validation, "validation", settings, maker, first_row_id=num_train
        )
        num_records += num_validation
    num_skipped = num_records - len(train) - len(validation)
    if settings.validation_fraction > 0:
        train, validation = _split(train, settings)
    if keep_share:
        train, validation = mark_withheld(train, validation, keep_share)
    return Dataset(train=train, validation=validation, num_skipped=num_skipped)


def dataset_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over ids, tokens and labels of the rows in order, in hex."""
    digest = hashlib.sha256()
    for example in examples:
        row = [example.row_id, example.tokens, example.labels]
        digest.update(json.dumps(row, separators=(",", ":")).encode())
    return digest.hexdigest()


def _load(
    path: Path, split: str, settings: DataSettings, maker: RowMaker, first_row_id: int
) -> tuple[list[Example], int]:
    """The rows of one path, and how many records it has."""
    examples: list[Example] = []
    num_records = 0
    for record in read_records(path, settings.kind, split):
        example = maker.make(record, first_row_id + num_records)
        num_records += 1
        if example is not None:
            examples.append(example)
    if not examples:
        raise DataError(
            f"{path}: all {num_records} rows are longer than {maker.max_length} tokens and were "
            "skipped; shorten them, or set data.on_too_long = truncate-prompt"
        )
    return examples, num_records


def _split(examples: list[Example], settings: DataSettings) -> tuple[list[Example], list[Example]]:
    num_validation = max(1, round(len(examples) * settings.validation_fraction))
    if num_validation >= len(examples):
        raise DataError(
            f"{settings.train}: validation_fraction={settings.validation_fraction} of "
            f"{len(examples)} rows leaves none to train on; choose a smaller one or add rows"
        )
    order = shuffled(len(examples), settings.split_seed, stream=0)
    chosen = set(order[:num_validation])
    train = [row for place, row in enumerate(examples) if place not in chosen]
    return train, [examples[place] for place in sorted(chosen)]
