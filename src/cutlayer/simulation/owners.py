"""The owners of a simulated federation and their private rows, as files of their own.

Rows come from the domains of an asset, from each owner's files, or from one file that is shared
out. It trains nothing, and no held-out row is a training row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cutlayer.data.assets import fetch
from cutlayer.data.batches import shuffled
from cutlayer.data.domains import domain_settings, domains, write_domain
from cutlayer.data.partition import partition
from cutlayer.data.row_files import write_row_files
from cutlayer.data.settings import DataSettings
from cutlayer.data.sources import Record, read_records
from cutlayer.errors import ConfigError, DataError
from cutlayer.settings import parse_settings
from cutlayer.simulation.settings import SimulationSettings

__all__ = ["OwnerRows", "prepare_rows"]

_DEFAULT_FRACTION = 0.2
_HELDOUT_STREAM = 22
"""Random stream, apart from those of partition and epochs."""


@dataclass(frozen=True, kw_only=True)
class OwnerRows:
    """One owner and where its rows lie."""

    name: str
    """As its certificate and the federation call it."""
    data: DataSettings
    """Training rows as `train`, held-out rows as `validation`."""


def prepare_rows(
    settings: SimulationSettings, folder: Path, cache: Path | None = None
) -> list[OwnerRows]:
    """Write or find every owner's rows.

    Args:
        settings: of the simulation.
        folder: gets a folder per owner.
        cache: of assets; None is the user's.

    Raises:
        DataError: rows are missing, unreadable or too few.
        ConfigError: the settings do not fit the rows.
    """
    if settings.domains is not None:
        return _from_domains(settings, folder, cache)
    if settings.owner:
        return [_from_files(settings, name, folder / name) for name in settings.owner]
    return _shared_out(settings, folder)


def _from_domains(
    settings: SimulationSettings, folder: Path, cache: Path | None
) -> list[OwnerRows]:
    wanted = settings.domains
    assert wanted is not None
    chosen = domains(
        fetch("sentiment", cache),
        settings.simulation.seed,
        wanted.train_rows,
        wanted.heldout_rows,
        wanted.names,
    )
    return [
        OwnerRows(name=name, data=domain_settings(*write_domain(data, folder / name)))
        for name, data in chosen.items()
    ]


def _from_files(settings: SimulationSettings, name: str, folder: Path) -> OwnerRows:
    files, data = settings.owner[name], _data(settings)
    if files.heldout is not None:
        changes = {"train": files.train, "validation": files.heldout, "validation_fraction": 0.0}
        return OwnerRows(name=name, data=_changed(data, changes))
    records = list(read_records(files.train, data.kind))
    return _kept_apart(name, records, settings, folder)


def _shared_out(settings: SimulationSettings, folder: Path) -> list[OwnerRows]:
    data = _data(settings)
    records = list(read_records(data.train, data.kind))
    parts = _partition(records, settings)
    names = _names(records, parts, settings)
    if data.validation is None:
        return [
            _kept_apart(name, [records[row] for row in part], settings, folder / name)
            for name, part in zip(names, parts, strict=True)
        ]
    heldout = _own_heldout(
        list(read_records(data.validation, data.kind, "validation")), records, parts, settings
    )
    return [
        _owner(name, [records[row] for row in part], own, data, folder)
        for name, part, own in zip(names, parts, heldout, strict=True)
    ]


def _data(settings: SimulationSettings) -> DataSettings:
    assert settings.data is not None
    return settings.data


def _changed(data: DataSettings, changes: dict[str, object]) -> DataSettings:
    return parse_settings(DataSettings, {**data.model_dump(), **changes}, "data")


def _partition(records: Sequence[Record], settings: SimulationSettings) -> list[list[int]]:
    rule, plan = settings.simulation.partition, settings.simulation
    keys = [""] * len(records)
    if rule.kind != "iid":
        column = rule.column or _label_column(settings)
        keys = [str(record.value(column)) for record in records]
    num_owners = plan.owners if plan.owners is not None else len(set(keys))
    return partition(keys, num_owners, rule, plan.seed)


def _label_column(settings: SimulationSettings) -> str:
    """The label of a row is its completion, where that is one column."""
    column = _data(settings).completion
    if column is None or settings.simulation.partition.kind == "natural":
        raise ConfigError(
            f'simulation.partition.column is required with kind = "'
            f'{settings.simulation.partition.kind}": the column that rows are shared out by'
        )
    return column


def _names(
    records: Sequence[Record], parts: Sequence[Sequence[int]], settings: SimulationSettings
) -> list[str]:
    """Natural owners have their column's values as names, where certificates allow."""
    numbered = [f"owner-{place}" for place in range(1, len(parts) + 1)]
    rule = settings.simulation.partition
    if rule.kind != "natural" or rule.column is None:
        return numbered
    values = [str(records[part[0]].value(rule.column)) for part in parts]
    names = [re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")[:40] for value in values]
    return names if all(names) and len(set(names)) == len(names) else numbered


def _own_heldout(
    heldout: list[Record],
    records: Sequence[Record],
    parts: Sequence[Sequence[int]],
    settings: SimulationSettings,
) -> list[list[Record]]:
    """A common held-out file is everybody's, but natural owners have their own rows of it."""
    rule = settings.simulation.partition
    if rule.kind != "natural" or rule.column is None:
        return [heldout for _ in parts]
    column = rule.column
    values = [str(records[part[0]].value(column)) for part in parts]
    return [[row for row in heldout if str(row.value(column)) == value] for value in values]


def _kept_apart(
    name: str, records: Sequence[Record], settings: SimulationSettings, folder: Path
) -> OwnerRows:
    """Keep a share of an owner's rows for scoring."""
    data = _data(settings)
    fraction = data.validation_fraction or _DEFAULT_FRACTION
    num_heldout = max(1, round(len(records) * fraction))
    if num_heldout >= len(records):
        raise DataError(f"{name} has {len(records)} rows, too few to keep {num_heldout} for scores")
    order = shuffled(len(records), settings.simulation.seed, _HELDOUT_STREAM)
    kept = set(order[:num_heldout])
    train = [record for place, record in enumerate(records) if place not in kept]
    return _owner(name, train, [records[place] for place in sorted(kept)], data, folder.parent)


def _owner(
    name: str,
    train: Sequence[Record],
    heldout: Sequence[Record],
    data: DataSettings,
    folder: Path,
) -> OwnerRows:
    if not heldout:
        raise DataError(f"{name} has no held-out row; give data.validation rows of every owner")
    fields = [[record.fields for record in records] for records in (train, heldout)]
    train_file, heldout_file = write_row_files(folder / name, *fields)
    changes: dict[str, object] = {
        "train": train_file,
        "validation": heldout_file,
        "kind": "jsonl",
        "validation_fraction": 0.0,
    }
    return OwnerRows(name=name, data=_changed(data, changes))
