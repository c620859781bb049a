"""A private model served: sealed weights come by the owner's key, adapters leave by its consent."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cutlayer.cli.checks import Status, check_server
from cutlayer.enclave.owner import EnclaveClient
from cutlayer.errors import (
    AttestationError,
    ConfigError,
    ModelError,
    PermissionRefused,
    TransportError,
)
from cutlayer.identity.provision import local, member_files
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.manifest import manifest_of
from cutlayer.model.partition import Cut, Part
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.tee.evidence import Platform
from cutlayer.tee.measure import measure_package
from cutlayer.tee.policy import Policy, read_policy
from cutlayer.tee.private_model.consent import give_consent, new_owner_key
from cutlayer.tee.private_model.exchange import hand_out
from cutlayer.tee.private_model.key_holder import KeyFolder, KeyHolder
from cutlayer.tee.private_model.label import What
from cutlayer.tee.private_model.sealed_part import seal_part
from cutlayer.tee.synthetic_quoter import ROOT_FILE, SyntheticQuoter
from tests.attested_worlds import AttestedWorld
from tests.enclave_worlds import attested_enclave, attested_owner
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings


def _settings(model: Path, folder: Path, **private: object) -> ServerSettings:
    """A server with a machine that attests it, and a section [private_model]."""
    files = member_files(local(folder / "certificates").server)
    tls = {name: str(getattr(files, name)) for name in ("certificate", "key", "authority")}
    table = server_settings(model, folder).model_dump(mode="json")
    table["listen"] |= {"plaintext": False, "tls": tls}
    table["tee"] = {"attester": {"source": "simulated", "folder": str(folder / "machine")}}
    table["private_model"] = private
    return parse_settings(ServerSettings, table, "test")


def _policy(folder: Path, measurement: str) -> Policy:
    return Policy(
        name="owner",
        platforms=[Platform.SIMULATED],
        least_assurance="simulated",
        measurements={"mr_td": [measurement]},
        roots={Platform.SIMULATED: folder / "machine" / ROOT_FILE},
    )


def test_an_adapter_leaves_with_its_owner_s_consent_alone(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    public = new_owner_key(tmp_path / "owner.pem")
    (tmp_path / "consents").mkdir()
    settings = server_settings(model, tmp_path).model_dump(mode="json")
    settings["private_model"] = {"owner": str(public), "consents": str(tmp_path / "consents")}
    served = parse_settings(ServerSettings, settings, "test")
    own = client_settings(model, tmp_path, train__steps=2)
    digest = manifest_of(ModelFolder(model)).root()
    with running_server(served) as server, client_of(server, own) as client:
        client.train()
        with pytest.raises(PermissionRefused, match="clinic has no consent of its owner"):
            client.export(tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        until = datetime.now(UTC) + timedelta(hours=1)
        consent = give_consent(tmp_path / "owner.pem", digest, What.ADAPTER, "clinic", until)
        (tmp_path / "consents" / "clinic.json").write_bytes(consent)
        assert client.export(tmp_path / "adapter") == 2


def test_a_server_computes_with_weights_that_are_sealed_on_its_disk(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    keys = KeyFolder(tmp_path / "keys")
    key = keys.new_key()
    label = seal_part(ModelFolder(model), Cut(1, 3), Part.TRUNK, tmp_path / "sealed", key)
    keys.keep(label, key)
    SyntheticQuoter.open(tmp_path / "machine")
    holder = KeyHolder(keys, _policy(tmp_path, measure_package().hex()))
    exchange = tmp_path / "exchange"
    owner = threading.Thread(target=hand_out, args=(holder, label, exchange, 30.0))
    owner.start()
    served = _settings(tmp_path / "sealed", tmp_path, exchange=str(exchange), timeout_s=30.0)
    losses = []
    with running_server(served) as server:
        owner.join(30)
        with client_of(server, client_settings(model, tmp_path, train__steps=2)) as client:
            losses.append([record.loss for record in client.train().history])
    (tmp_path / "plain").mkdir()
    with running_server(server_settings(model, tmp_path / "plain")) as server:
        own = client_settings(model, tmp_path / "plain", train__steps=2)
        with client_of(server, own) as client:
            losses.append([record.loss for record in client.train().history])
    assert losses[0] == losses[1]


def test_a_server_that_the_policy_does_not_name_does_not_start(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    keys = KeyFolder(tmp_path / "keys")
    key = keys.new_key()
    label = seal_part(ModelFolder(model), Cut(1, 3), Part.TRUNK, tmp_path / "sealed", key)
    keys.keep(label, key)
    SyntheticQuoter.open(tmp_path / "machine")
    exchange, heard = tmp_path / "exchange", []

    def hand_out_to_others() -> None:
        try:
            hand_out(KeyHolder(keys, _policy(tmp_path, "00" * 48)), label, exchange, 30.0)
        except AttestationError as error:
            heard.append(error.refusal)

    owner = threading.Thread(target=hand_out_to_others)
    owner.start()
    served = _settings(tmp_path / "sealed", tmp_path, exchange=str(exchange), timeout_s=2.0)
    with pytest.raises(TransportError, match="did the other side refuse"), running_server(served):
        pass
    owner.join(30)
    assert heard == ["wrong-measurement"]


def test_sealed_weights_without_an_owner_or_an_attester_are_explained(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    seal_part(ModelFolder(model), Cut(1, 3), Part.TRUNK, tmp_path / "sealed", bytes(32))
    plain = server_settings(tmp_path / "sealed", tmp_path)
    with pytest.raises(ConfigError, match=r"private_model\.exchange"), running_server(plain):
        pass
    table = plain.model_dump(mode="json") | {"private_model": {"exchange": str(tmp_path)}}
    half = parse_settings(ServerSettings, table, "test")
    with pytest.raises(ConfigError, match="attested places alone"), running_server(half):
        pass


def test_sealed_weights_are_not_shown_to_an_accelerator(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    seal_part(ModelFolder(model), Cut(1, 3), Part.TRUNK, tmp_path / "sealed", bytes(32))
    masked = {"accelerator": "127.0.0.1:1", "source": "precompute"}
    private = {"exchange": str(tmp_path)}
    table = server_settings(tmp_path / "sealed", tmp_path).model_dump(mode="json")
    served = parse_settings(
        ServerSettings, table | {"masked": masked, "private_model": private}, "x"
    )
    with pytest.raises(ConfigError, match="to an accelerator in the clear"), running_server(served):
        pass
    world = AttestedWorld.make(tmp_path / "world")
    inside = {"model__path": str(tmp_path / "sealed"), "masked": masked}
    with pytest.raises(ConfigError, match="in the clear"), attested_enclave(world, **inside):
        pass


def test_plain_weights_in_place_of_sealed_ones_are_refused(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    table = server_settings(model, tmp_path).model_dump(mode="json")
    table["private_model"] = {"exchange": str(tmp_path)}
    served = parse_settings(ServerSettings, table, "test")
    with pytest.raises(ConfigError, match="is not sealed"), running_server(served):
        pass


def test_an_enclave_opens_its_sealed_blocks_and_an_owner_trains_with_them(tmp_path: Path) -> None:
    world = AttestedWorld.make(tmp_path)
    keys = KeyFolder(tmp_path / "keys")
    key = keys.new_key()
    # All that comes after the owners' block 0.
    plain, sealed = ModelFolder(world.model), tmp_path / "sealed"
    label = seal_part(plain, Cut(0, 1), Part.TAIL, sealed, key)
    keys.keep(label, key)
    holder = KeyHolder(keys, read_policy(world.policy()))
    exchange = tmp_path / "exchange"
    inside = {"model__path": str(sealed), "private_model__exchange": str(exchange)}
    owner = threading.Thread(target=hand_out, args=(holder, label, exchange, 30.0))
    owner.start()
    losses = []
    with attested_enclave(world, **inside) as server:
        owner.join(30)
        settings = attested_owner(world, server.port, tmp_path / "one", train__steps=2)
        with EnclaveClient(settings) as client:
            losses.append([record.loss for record in client.train().history])
    with attested_enclave(world, state__folder=str(tmp_path / "other")) as server:
        settings = attested_owner(world, server.port, tmp_path / "two", train__steps=2)
        with EnclaveClient(settings) as client:
            losses.append([record.loss for record in client.train().history])
    assert losses[0] == losses[1]


def test_a_sealed_folder_where_none_can_be_opened_is_explained(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    seal_part(ModelFolder(model), Cut(1, 3), Part.TRUNK, tmp_path / "sealed", bytes(32))
    with pytest.raises(ModelError, match="holds sealed weights"):
        resolve_model(tmp_path / "sealed")
    findings = check_server(server_settings(tmp_path / "sealed", tmp_path))
    (found,) = [finding for finding in findings if finding.name == "model"]
    assert found.status is Status.WARN
    assert "owner's key comes" in found.text
