"""A part's key goes to an attested place alone, and the part is then loaded there."""

import secrets
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cutlayer.errors import AttestationError, ConfigError, PermissionRefused, StorageError
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Cut, Part
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.challenge import Challenger, Prover
from cutlayer.tee.evidence import Platform
from cutlayer.tee.exhibit import Side
from cutlayer.tee.measure import measure_package
from cutlayer.tee.policy import Policy
from cutlayer.tee.private_model.key_holder import NO_CHANNEL, KeyFolder, KeyHolder, terms
from cutlayer.tee.private_model.label import Label
from cutlayer.tee.private_model.sealed_part import SealedFolder, seal_part
from cutlayer.tee.synthetic_quoter import ROOT_FILE, SyntheticQuoter
from cutlayer.tee.verifier import utc_now
from tests.tiny_models import tiny_llama_folder

CUT = Cut(1, 3)


class World:
    """An owner with a sealed part and a key, and a place on a simulated machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = ModelFolder(tiny_llama_folder(folder))
        self.sealed = folder / "sealed"
        self.keys = KeyFolder(folder / "keys")
        key = self.keys.new_key()
        self.label = seal_part(self.plain, CUT, Part.TRUNK, self.sealed, key)
        self.keys.keep(self.label, key)
        SyntheticQuoter.open(folder / "machine")
        source = AttesterSettings(source="simulated", folder=folder / "machine")
        self.place = Prover(source, Side.SERVER)

    def policy(self, measurement: str | None = None) -> Policy:
        return Policy(
            name="owner",
            platforms=[Platform.SIMULATED],
            least_assurance="simulated",
            measurements={"mr_td": [measurement or measure_package().hex()]},
            roots={Platform.SIMULATED: self.folder / "machine" / ROOT_FILE},
        )

    def holder(self, measurement: str | None = None, lifetime_s: float = 300.0) -> KeyHolder:
        return KeyHolder(self.keys, self.policy(measurement), lifetime_s)

    def prove(self, nonce: bytes, label: Label | None = None) -> bytes:
        return self.place.prove(nonce, NO_CHANNEL, terms(label or self.label))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("holder"))


def test_an_attested_place_loads_the_part(world: World) -> None:
    holder = world.holder()
    nonce = holder.challenge()
    released = holder.release(world.label, world.prove(nonce), nonce)
    key = world.place.sealing_key.open(released, Side.SERVER, world.label.job, utc_now())
    found = load_part(SealedFolder(world.sealed, key), CUT, Part.TRUNK)
    wanted = load_part(world.plain, CUT, Part.TRUNK)
    for name, weight in wanted.state_dict().items():
        assert torch.equal(weight, found.state_dict()[name])


def test_other_software_gets_no_key(world: World) -> None:
    holder = world.holder(measurement="00" * 48)
    nonce = holder.challenge()
    with pytest.raises(AttestationError) as refusal:
        holder.release(world.label, world.prove(nonce), nonce)
    assert refusal.value.refusal == "wrong-measurement"


def test_a_proof_is_for_one_nonce_and_one_label(world: World) -> None:
    holder = world.holder()
    nonce = holder.challenge()
    proof = world.prove(nonce)
    holder.release(world.label, proof, nonce)
    with pytest.raises(AttestationError) as again:
        holder.release(world.label, proof, nonce)
    assert again.value.refusal == "replayed"
    with pytest.raises(AttestationError) as unasked:
        holder.release(world.label, proof, secrets.token_bytes(32))
    assert unasked.value.refusal == "replayed"
    other = Label(what=world.label.what, content="00" * 32, key_id=world.label.key_id)
    nonce = holder.challenge()
    with pytest.raises(AttestationError) as moved:
        holder.release(world.label, world.prove(nonce, other), nonce)
    assert moved.value.refusal == "wrong-binding"


def test_a_released_key_opens_at_its_place_for_its_job_and_time(world: World) -> None:
    holder = world.holder(lifetime_s=60.0)
    nonce = holder.challenge()
    released = holder.release(world.label, world.prove(nonce), nonce)
    late = utc_now() + timedelta(minutes=2)
    own, job = world.place.sealing_key, world.label.job
    stranger = Prover(AttesterSettings(source="simulated"), Side.SERVER).sealing_key
    for place, wanted, at in (
        (own, job, late),
        (own, "another job", utc_now()),
        (stranger, job, utc_now()),
    ):
        with pytest.raises(AttestationError):
            place.open(released, Side.SERVER, wanted, at)
    assert len(own.open(released, Side.SERVER, job, utc_now())) == 32


def test_a_policy_without_a_measurement_is_refused(world: World) -> None:
    open_policy = world.policy().model_copy(update={"measurements": {}})
    with pytest.raises(ConfigError, match="any software would get the keys"):
        KeyHolder(world.keys, open_policy)


def test_a_place_accepted_under_another_policy_gets_nothing(world: World) -> None:
    lax = world.policy().model_copy(update={"name": "lax"})
    challenger = Challenger(lax, Side.SERVER)
    nonce = challenger.draw()
    place = challenger.judge(world.prove(nonce), nonce, NO_CHANNEL, terms(world.label))
    with pytest.raises(PermissionRefused, match="policy lax"):
        world.holder().release_to(world.label, place)


def test_a_missing_or_changed_key_file_is_named(world: World, tmp_path: Path) -> None:
    keys = KeyFolder(tmp_path / "keys")
    with pytest.raises(StorageError, match="cannot read"):
        keys.load(world.label)
    path = keys.keep(world.label, secrets.token_bytes(32))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError, match="is not the key"):
        keys.load(world.label)
    path.write_text("no hex")
    with pytest.raises(StorageError, match="holds no key"):
        keys.load(world.label)
