"""A key's way through a folder: to the place that answers the owner's challenge, or nowhere."""

import threading
from pathlib import Path

import pytest

from cutlayer.errors import AttestationError, TransportError
from cutlayer.model.checkpoint import load_part
from cutlayer.model.partition import Part
from cutlayer.tee.private_model.exchange import hand_out, receive
from cutlayer.tee.private_model.sealed_part import SealedFolder
from tests.unit.tee.private_model.test_key_holder import CUT, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("exchange"))


def test_the_key_reaches_the_place_through_a_folder(world: World, tmp_path: Path) -> None:
    # What an earlier exchange left there does not count.
    for name in ("proof", "key"):
        (tmp_path / name).write_bytes(b"old")
    owner = threading.Thread(target=hand_out, args=(world.holder(), world.label, tmp_path, 20.0))
    owner.start()
    with receive(world.label, world.place, tmp_path, timeout_s=20.0) as key, key.view() as view:
        part = load_part(SealedFolder(world.sealed, bytes(view)), CUT, Part.TRUNK)
        shared = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert bytes(view) not in shared
    owner.join(20)
    assert part.leaves["block.1"] == load_part(world.plain, CUT, Part.TRUNK).leaves["block.1"]


def test_a_place_of_other_software_is_refused_and_told_nothing(
    world: World, tmp_path: Path
) -> None:
    heard: list[Exception] = []

    def ask() -> None:
        try:
            receive(world.label, world.place, tmp_path, timeout_s=1.0)
        except TransportError as error:
            heard.append(error)

    place = threading.Thread(target=ask)
    place.start()
    with pytest.raises(AttestationError, match="wrong-measurement"):
        hand_out(world.holder(measurement="00" * 48), world.label, tmp_path, 20.0)
    place.join(20)
    assert "refuse" in str(heard[0])
    assert not (tmp_path / "key").exists()


def test_silence_ends_with_an_error_on_both_sides(world: World, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="proof within"):
        hand_out(world.holder(), world.label, tmp_path / "one", 0.1)
    with pytest.raises(TransportError, match="challenge within"):
        receive(world.label, world.place, tmp_path / "two", 0.1)


def test_an_owner_that_begins_anew_ends_the_old_exchange(world: World, tmp_path: Path) -> None:
    (tmp_path / "challenge").write_bytes(bytes(32))
    timer = threading.Timer(0.3, lambda: (tmp_path / "challenge").write_bytes(bytes([1]) * 32))
    timer.start()
    with pytest.raises(TransportError, match="began anew"):
        receive(world.label, world.place, tmp_path, timeout_s=20.0)
    timer.join()


def test_a_folder_full_of_rubbish_gives_named_errors(world: World, tmp_path: Path) -> None:
    (tmp_path / "challenge").write_bytes(b"short")
    (tmp_path / "key").write_bytes(b"\xff" * 100)
    with pytest.raises(AttestationError, match="malformed"):
        receive(world.label, world.place, tmp_path, timeout_s=5.0)
