"""Private rows of simulated owners: apart from each other, and training apart from scoring."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, DataError
from cutlayer.simulation.owners import OwnerRows, prepare_rows
from tests.unit.simulation.simulated import simulated
from tests.worlds import write_rows


def _rows(path: Path | None) -> list[str]:
    assert path is not None
    return path.read_text().splitlines()


def _numbered(path: Path, num_rows: int) -> Path:
    """Rows that are all different."""
    rows = [
        {"text": f"row {row}", "topic": f"t{row % 4}", "site": f"Site {'AB'[row % 2]}"}
        for row in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _prepare(tmp_path: Path, **changes: object) -> list[OwnerRows]:
    changes.setdefault("data__train", str(_numbered(tmp_path / "all.jsonl", 40)))
    return prepare_rows(simulated(tmp_path, tmp_path, **changes), tmp_path / "owners")


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_every_row_is_one_owners_and_is_trained_or_scored(tmp_path: Path, kind: str) -> None:
    partition = {"kind": kind, "column": "topic"}
    owners = _prepare(tmp_path, simulation={"owners": 3, "partition": partition})
    assert [owner.name for owner in owners] == ["owner-1", "owner-2", "owner-3"]
    lines = [line for o in owners for line in _rows(o.data.train) + _rows(o.data.validation)]
    assert Counter(lines) == Counter(_rows(tmp_path / "all.jsonl"))
    assert all(len(_rows(owner.data.validation)) in (3, 4) for owner in owners)


def test_the_label_column_is_the_completion_where_none_is_named(tmp_path: Path) -> None:
    partition = {"kind": "dirichlet", "alpha": 0.01}
    with pytest.raises(ConfigError, match=r"simulation\.partition\.column is required"):
        _prepare(tmp_path, simulation={"owners": 2, "partition": partition})
    data = {"train": str(tmp_path / "all.jsonl"), "prompt": "text", "completion": "topic"}
    owners = _prepare(tmp_path, data=data, simulation={"owners": 2, "partition": partition})
    topics = Counter(json.loads(line)["topic"] for line in _rows(owners[0].data.train))
    assert len(topics) < 4


def test_natural_owners_are_called_by_their_column(tmp_path: Path) -> None:
    plan = {"partition": {"kind": "natural", "column": "site"}}
    owners = _prepare(tmp_path, simulation=plan)
    assert [owner.name for owner in owners] == ["site-a", "site-b"]
    for owner, site in zip(owners, ("Site A", "Site B"), strict=True):
        lines = _rows(owner.data.train) + _rows(owner.data.validation)
        assert {json.loads(line)["site"] for line in lines} == {site}


def test_a_common_heldout_file_is_everybodys_or_divided_by_domain(tmp_path: Path) -> None:
    common = _numbered(tmp_path / "heldout.jsonl", 6)
    data = {"validation_fraction": 0.0, "validation": str(common)}
    changes = {f"data__{key}": value for key, value in data.items()}
    everybodys = _prepare(tmp_path, **changes)
    assert all(_rows(owner.data.validation) == _rows(common) for owner in everybodys)
    plan = {"partition": {"kind": "natural", "column": "site"}}
    divided = _prepare(tmp_path, simulation=plan, **changes)
    assert [len(_rows(owner.data.validation)) for owner in divided] == [3, 3]


def test_owners_bring_files_of_their_own(tmp_path: Path) -> None:
    first, second = _numbered(tmp_path / "a.jsonl", 10), write_rows(tmp_path / "b.jsonl", 5)
    owner = {
        "clinic": {"train": str(first), "heldout": str(second)},
        "lab": {"train": str(first)},
    }
    clinic, lab = _prepare(tmp_path, owner=owner)
    assert (clinic.name, clinic.data.train, clinic.data.validation) == ("clinic", first, second)
    assert (len(_rows(lab.data.train)), len(_rows(lab.data.validation))) == (8, 2)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    few = str(_numbered(tmp_path / "few.jsonl", 2))
    with pytest.raises(DataError, match="owner-1 has 1 rows, too few to keep 1 for scores"):
        _prepare(
            tmp_path,
            data__train=few,
            simulation={"owners": 2, "partition": {"min_rows": 1}},
        )


def test_domains_give_four_owners(tmp_path: Path) -> None:
    changes = {"data": None, "domains": {"train_rows": 4, "heldout_rows": 6}}
    owners = prepare_rows(simulated(tmp_path, tmp_path, **changes), tmp_path / "owners")
    assert [owner.name for owner in owners] == ["movies", "amazon", "tweets", "nyt"]
    assert all(len(_rows(owner.data.train)) == 4 for owner in owners)
    assert all(len(_rows(owner.data.validation)) == 6 for owner in owners)
