"""One file for a federation: what is filled in, and what is refused before anything starts."""

from pathlib import Path

import pytest

from cutlayer.errors import ConfigError
from tests.unit.simulation.simulated import simulated


def test_the_adapter_may_stand_at_either_place_but_not_at_both(tmp_path: Path) -> None:
    assert simulated(tmp_path, tmp_path).federation.adapter.rank == 4
    inner = {"name": "tiny", "rounds": 2, "adapter": {"rank": 2}}
    assert (
        simulated(tmp_path, tmp_path, federation=inner, adapter=None).federation.adapter.rank == 2
    )
    with pytest.raises(ConfigError, match=r"set adapter or federation\.adapter, not both"):
        simulated(tmp_path, tmp_path, federation=inner)


@pytest.mark.parametrize("key", ["steps", "epochs"])
def test_rounds_alone_say_how_long_owners_train(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"remove train\.steps and train\.epochs"):
        simulated(tmp_path, tmp_path, **{f"train__{key}": 3})


def test_rows_come_from_exactly_one_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say where rows come from: set domains or data"):
        simulated(tmp_path, tmp_path, data=None)
    with pytest.raises(ConfigError, match="domains brings its own rows"):
        simulated(tmp_path, tmp_path, domains={"train_rows": 8})


def test_shared_out_rows_need_a_number_of_owners(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"simulation\.owners is required"):
        simulated(tmp_path, tmp_path, simulation={"seed": 1})
    natural = {"partition": {"kind": "natural", "column": "topic"}}
    assert simulated(tmp_path, tmp_path, simulation=natural).simulation.owners is None


def test_owners_with_files_need_no_common_file(tmp_path: Path) -> None:
    data = {"prompt": "text", "completion": "topic"}
    owner = {"a": {"train": "a.jsonl"}, "b": {"train": "b.jsonl"}}
    settings = simulated(tmp_path, tmp_path, data=data, owner=owner)
    assert settings.data is not None
    assert settings.data.train == Path("a.jsonl")


def test_a_misspelt_key_is_named_with_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"simulation\.owner is not a setting; did you mean own"):
        simulated(tmp_path, tmp_path, simulation={"owner": 3})


@pytest.mark.parametrize("name", ["Clinic A", "../up", "x" * 41, "a-"])
def test_owners_have_names_that_certificates_and_folders_can_have(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="a name has up to 40 of a-z"):
        simulated(tmp_path, tmp_path, owner={name: {"train": "a.jsonl"}})
