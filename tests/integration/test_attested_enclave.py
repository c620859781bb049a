"""An owner and an enclave over TLS with evidence of a simulated machine: rows, labels, bytes."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cutlayer.client.train import Report
from cutlayer.enclave.owner import EnclaveClient
from cutlayer.enclave.owner_settings import EnclaveClientSettings, LabelPlace
from cutlayer.errors import AttestationError, ConfigError
from cutlayer.settings import parse_settings
from cutlayer.wire.pinned import shown_certificate
from tests.attested_worlds import AttestedWorld
from tests.enclave_worlds import (
    attested_enclave,
    attested_owner,
    enclave_settings,
    owner_settings,
    running_enclave,
)
from tests.tiny_models import tiny_llama_folder

STEPS_PER_EPOCH = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AttestedWorld:
    return AttestedWorld.make(tmp_path_factory.mktemp("attested"))


def _with_labels(settings: EnclaveClientSettings, place: LabelPlace) -> EnclaveClientSettings:
    table = {**settings.model_dump(mode="json", exclude_defaults=True), "labels": place.value}
    return parse_settings(EnclaveClientSettings, table, "test owner")


def test_labels_inside_and_labels_at_home_learn_the_same(
    world: AttestedWorld, tmp_path: Path
) -> None:
    losses, adapters, bytes_up = {}, {}, {}
    with attested_enclave(world) as server:
        for place in (LabelPlace.CLIENT, LabelPlace.ENCLAVE):
            changes = {"data__validation_fraction": 0.2, "sampling__max_new_tokens": 8}
            settings = attested_owner(world, server.port, tmp_path / place, **changes)
            epochs: list[int] = []

            def note(report: Report, epochs: list[int] = epochs) -> None:
                # The last step brings the validation rows.
                if report.record.step in (STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH - 1):
                    epochs.append(owner.enclave.bytes_sent)

            with EnclaveClient(_with_labels(settings, place)) as owner:
                progress = owner.train(note)
                assert owner.guarantee.startswith("attestation: SIMULATED, by policy server")
                owner.export(tmp_path / place / "out")
                replies = owner.generate(["ab:"])
                # At the socket: frames of the first epoch with, of the second without rows.
                bytes_up[place] = (epochs[0], epochs[1] - epochs[0])
            losses[place] = [r.loss for r in progress.history] + [*progress.evaluations.values()]
            adapters[place] = load_file(tmp_path / place / "out" / "adapter_model.safetensors")
            assert len(replies) == 1
    assert losses[LabelPlace.CLIENT] == pytest.approx(losses[LabelPlace.ENCLAVE], rel=1e-5)
    for key, tensor in adapters[LabelPlace.CLIENT].items():
        torch.testing.assert_close(tensor, adapters[LabelPlace.ENCLAVE][key], rtol=1e-3, atol=2e-5)
    first, second = bytes_up[LabelPlace.ENCLAVE]
    # Row ids and commits alone; and no gradients of logits, which labels at home cost.
    assert second < 0.1 * first
    assert second < 0.1 * bytes_up[LabelPlace.CLIENT][1]


def test_an_enclave_of_another_measurement_gets_nothing(
    world: AttestedWorld, tmp_path: Path
) -> None:
    with attested_enclave(world) as server:
        settings = attested_owner(world, server.port, tmp_path / "a")
        policy = world.policy(measurements={"mr_td": ["00" * 48]})
        table = settings.model_dump(mode="json", exclude_defaults=True)
        wary = parse_settings(
            EnclaveClientSettings, {**table, "tee": {"policy": str(policy)}}, "test owner"
        )
        with EnclaveClient(wary) as owner:
            with pytest.raises(AttestationError, match="wrong-measurement"):
                owner.train()
            assert owner.feeder is not None
            assert owner.feeder.num_sent == 0
        assert server.desk.rows.used_bytes == 0


def test_proof_and_labels_are_guarded_by_the_settings(tmp_path: Path) -> None:
    model = tmp_path / "model"
    with pytest.raises(ConfigError, match=r"tee\.policy is missing"):
        owner_settings(model, tmp_path, tee={})
    with pytest.raises(ConfigError, match="labels go to nobody who has not"):
        owner_settings(model, tmp_path, labels="enclave")


def test_without_proof_the_line_says_so(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = owner_settings(model, tmp_path / "a")
    with running_enclave(enclave_settings(model, tmp_path)), EnclaveClient(settings) as owner:
        assert owner.guarantee == "attestation: NONE"


def test_an_enclave_that_restarts_proves_itself_anew_and_gets_the_rows_again(
    world: AttestedWorld, tmp_path: Path
) -> None:
    state = {"state": {"folder": str(tmp_path / "s"), "key_file": str(tmp_path / "s.key")}}
    with ExitStack() as stack:
        first = ExitStack()
        server = first.enter_context(attested_enclave(world, **state))
        settings = attested_owner(world, server.port, tmp_path / "a", train__save_every=2)
        owner = stack.enter_context(EnclaveClient(settings))
        keys = []

        def restart(report: Report) -> None:
            keys.append(shown_certificate(settings.connection))
            if report.record.step == 3 and len(set(keys)) == 1:
                first.close()
                address = {"listen__address": f"127.0.0.1:{server.port}"}
                stack.enter_context(attested_enclave(world, **state, **address))

        progress = owner.train(restart)
        assert len(set(keys)) == 2
        assert owner.feeder is not None
        assert owner.feeder.num_sent > 24
    losses = [record.loss for record in progress.history]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_two_attested_owners_end_with_one_adapter(world: AttestedWorld, tmp_path: Path) -> None:
    names = ("bank", "clinic")
    rounds = {
        **{"name": "both", "rounds": 2, "local_steps": 2, "adapter": {"rank": 4, "alpha": 8}},
        **{"min_members": 2, "quorum": 2, "min_cohort": 2, "gather_s": 0.0},
    }
    state = {"folder": str(tmp_path / "s"), "key_file": str(tmp_path / "s.key")}
    train = {"rows_per_step": 8, "lr": 0.02}
    mine = {"name": "both", "min_cohort": 2}

    def take_part(name: str) -> EnclaveClient:
        settings = attested_owner(
            world, server.port, tmp_path / name, name, rounds=mine, train=train
        )
        with EnclaveClient(settings) as owner:
            assert owner.train().step == 2
            owner.export(tmp_path / name / "out")
        return owner

    with (
        attested_enclave(world, rounds=rounds, state=state) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        for owner in pool.map(take_part, names):
            assert owner.guarantee.startswith("attestation: SIMULATED")
    first, second = (
        load_file(tmp_path / name / "out" / "adapter_model.safetensors") for name in names
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
