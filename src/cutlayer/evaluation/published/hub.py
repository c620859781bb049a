"""Published tasks from a model hub, by the library `datasets`.

It knows no task's columns (`PublishedTask.read_records`), and code that a repository brings along
is never run: of a repository that is a script the hub's own conversion to Parquet is read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.data.sources import Record
from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    DataError,
    StorageError,
    TransportError,
)
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import HubName, Question, Split

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["hub_questions"]

_PARQUET_BRANCH = "refs/convert/parquet"
"""Where the hub keeps its conversions, one folder a config."""


def hub_questions(task_name: str, split: Split, cache: Path | None = None) -> list[Question]:
    """The questions of a task as a model hub has it; it is downloaded when first wanted.

    Args:
        task_name: as registered.
        split: one that the hub has with this name.
        cache: where downloads are kept; None is the hub client's own cache.

    Raises:
        ConfigError: no such task, no hub has it, or the hub refuses it.
        TransportError: the hub cannot be reached and the cache does not hold the task.
        DataError: the hub lacks the split, or its rows are damaged or have other columns.
        StorageError: the cache cannot be written.
    """
    task = published_task(task_name)
    if task.hub is None:
        raise ConfigError(f"no hub has the task {task_name}; take its packaged or original files")
    _check_not_local(task.hub)
    splits = _load(task.hub, cache)
    if split.value not in splits:
        known = ", ".join(splits)
        raise DataError(f"{_spelt(task.hub)} has no split {split.value!r}; its splits are {known}")
    return task.read_records(_records(splits[split.value], f"{_spelt(task.hub)} {split}"), split)


def _check_not_local(hub: HubName) -> None:
    """`datasets` prefers a folder of that name in the working folder, without a word."""
    if Path(hub.repository).exists():
        raise ConfigError(
            f"the working folder holds {hub.repository}, which would be read in place of the "
            "hub's; run elsewhere, or give that folder as the source of original files"
        )


def _records(rows: "Dataset", where: str) -> Iterator[Record]:
    for number, fields in enumerate(rows, start=1):
        yield Record(fields, f"{where} row {number}")


def _load(hub: HubName, cache: Path | None) -> "Mapping[str, Dataset]":
    # Wait until a hub is really asked: importing them takes seconds.
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    cache_folder = None if cache is None else str(cache / "datasets")
    try:
        return _download(hub, cache_folder)
    except (DatasetsError, HFValidationError, httpx.HTTPError, OSError, ValueError) as error:
        raise _explained(hub, error) from error


def _download(hub: HubName, cache_folder: str | None) -> "Mapping[str, Dataset]":
    """All splits: which there are is known only afterwards, and one is not downloaded alone."""
    import datasets

    splits: Mapping[str, Dataset]
    try:
        splits = datasets.load_dataset(hub.repository, name=hub.config, cache_dir=cache_folder)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        splits = datasets.load_dataset(
            hub.repository,
            data_dir=hub.config or "default",
            revision=_PARQUET_BRANCH,
            cache_dir=cache_folder,
        )
    return splits


def _explained(hub: HubName, error: Exception) -> CutlayerError:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
    from pyarrow import ArrowException

    name = _spelt(hub)
    if isinstance(error, DatasetNotFoundError):
        return ConfigError(f"{name}: {error} Check the name, or log in with `hf auth login`")
    if isinstance(error, DatasetsError | EmptyDatasetError | ArrowException):
        return DataError(
            f"{name} came damaged or without data ({type(error).__name__}); "
            "fetch it again into an empty cache, or take the original files"
        )
    # `datasets` calls it a missing file where the hub answers with an error of its own.
    if isinstance(error, ConnectionError | FileNotFoundError | httpx.HTTPError):
        return TransportError(
            f"{name} is not in the cache and the hub cannot be reached or does not answer; "
            "connect, unset HF_HUB_OFFLINE, or take the packaged or original files"
        )
    if isinstance(error, OSError):
        return StorageError(f"cannot keep {name} in the cache: {error.strerror}; free it")
    return ConfigError(f"{name}: {error}")


def _spelt(hub: HubName) -> str:
    config = f" ({hub.config})" if hub.config else ""
    return f"{hub.repository}{config} of the hub"
