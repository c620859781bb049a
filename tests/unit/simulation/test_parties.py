"""Settings of everybody in a simulated federation, as their hands would have written them."""

from pathlib import Path

import pytest

from cutlayer.errors import ConfigError
from cutlayer.federation.settings import TrunkSharing
from cutlayer.simulation.owners import prepare_rows
from cutlayer.simulation.parties import Parties, num_steps, open_model, owner_at, parties
from cutlayer.storage.files import private_folder
from tests.unit.simulation.simulated import simulated


def _parties(tmp_path: Path, **changes: object) -> Parties:
    settings = simulated(tmp_path / "model", tmp_path, **changes)
    rows = prepare_rows(settings, tmp_path / "rows")
    return parties(settings, tmp_path / "model", rows, private_folder(tmp_path / "work"))


def test_all_owners_are_in_every_round_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    federation = _parties(tmp_path, simulation__owners=5).federation
    assert federation.members == [f"owner-{n}" for n in range(1, 6)]
    assert (federation.min_members, federation.quorum, federation.gather_s) == (5, 5, 0.0)
    changes = {"federation__min_members": 4, "federation__quorum": 3, "federation__cohort": 3}
    stated = _parties(tmp_path, simulation__owners=5, **changes).federation
    assert (stated.min_members, stated.quorum, stated.cohort) == (4, 3, 3)
    assert stated.trunk is TrunkSharing.SHARED


def test_alone_takes_as_many_steps_as_all_rounds(tmp_path: Path) -> None:
    made = _parties(tmp_path, simulation__seed=7)
    owner = made.owners[0]
    assert num_steps(made.federation) == 4
    assert owner.alone.train is not None
    assert owner.together.train is not None
    assert (owner.alone.train.steps, owner.together.train.steps) == (4, None)
    assert owner.alone.train.seed == owner.together.train.seed == made.federation.seed == 7
    assert owner.alone.federation is None
    assert owner.alone.run.folder != owner.together.run.folder
    assert owner.alone.adapter == owner.together.adapter == made.federation.adapter
    gradients = _parties(tmp_path, federation__strategy={"kind": "every_step"})
    assert num_steps(gradients.federation) == 2


def test_heldout_rows_are_no_part_of_training(tmp_path: Path) -> None:
    for owner in _parties(tmp_path).owners:
        assert owner.rows.data.validation is not None
        for settings in (owner.alone, owner.together):
            assert settings.data is not None
            assert settings.data.validation is None
            assert settings.data.validation_fraction == 0


def test_owners_agree_to_what_their_federation_asks(tmp_path: Path) -> None:
    def membership(**secure: object) -> tuple[bool, Path | None]:
        made = _parties(tmp_path, federation__secure=secure)
        mine = made.owners[0].together.federation
        assert mine is not None
        return mine.share_plain_updates, mine.group_key_file

    assert membership() == (False, None)
    assert membership(enabled=False) == (True, None)
    shares, key = membership(hides_aggregate=True)
    assert not shares
    assert key is not None
    assert key.stat().st_mode & 0o077 == 0


def test_processes_have_keys_of_their_own_and_threads_none(tmp_path: Path) -> None:
    made = _parties(tmp_path, simulation__processes=True)
    files = [owner.together.connection.tls for owner in made.owners]
    assert made.server.listen.tls is not None
    assert len({tls.key for tls in files if tls is not None}) == 3
    assert made.server.revoked is not None
    threads = _parties(tmp_path)
    assert threads.server.listen.tls is None
    assert threads.owners[0].together.connection.plaintext
    assert owner_at(made.owners[0].alone, "127.0.0.1:5").connection.address[-2:] == ":5"


def test_unknown_assets_and_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.path='asset:gpt5': no such asset; there are smo"):
        open_model(simulated(Path("asset:gpt5"), tmp_path))
