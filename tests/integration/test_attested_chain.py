"""Evidence hop by hop, over mutual TLS: each by its own policy, results by the least of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cutlayer import Client, ClientSettings, ServerSettings
from cutlayer.enclave.owner import EnclaveClient
from cutlayer.enclave.owner_settings import EnclaveClientSettings
from cutlayer.errors import AttestationError
from cutlayer.settings import parse_settings
from tests.attested_worlds import AttestedWorld, Served
from tests.enclave_worlds import attested_enclave, attested_owner


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> AttestedWorld:
    return AttestedWorld.make(tmp_path_factory.mktemp("attested"))


@contextmanager
def _hop(world: AttestedWorld, lower: int, upper: int) -> Iterator[Served]:
    """A trunk host of these blocks that attests."""
    table = world.server(f"hop{lower}").model_dump(mode="json", exclude_defaults=True)
    table["model"] |= {"lower": lower, "upper": upper}
    with world.serving(parse_settings(ServerSettings, table, "test server")) as served:
        yield served


def _chain(
    world: AttestedWorld, first: Served, second: Served, name: str, **tee: object
) -> ClientSettings:
    settings = world.client(first.port, name=name)
    table = settings.model_dump(mode="json", exclude_defaults=True)
    later = {
        "lower": 2,
        "upper": 3,
        "connection": {"address": f"127.0.0.1:{second.port}", "codec": "raw"},
        "privacy": {"mechanism": "none"},
    }
    table["hops"] = [{"lower": 1, "upper": 2}, {**later, **tee}]
    return parse_settings(ClientSettings, table, "test client")


def test_a_hop_that_proves_something_else_is_given_nothing(world: AttestedWorld) -> None:
    with _hop(world, 1, 2) as first, _hop(world, 2, 3) as second:
        other = str(world.policy(measurements={"mr_td": ["00" * 48]}))
        refusing = _chain(world, first, second, "clinic", tee={"policy": other})
        with Client(refusing) as client, pytest.raises(AttestationError):
            client.train()
        assert second.arrived.num_tensors == 0
        own = _chain(world, first, second, "clinic", tee={"policy": str(world.policy())})
        with Client(own) as client:
            assert client.train().step == 2
            assert client.attestation is not None
            assert client.attestation.label == "SIMULATED"
            assert client.attestation.line.startswith("hop 1 attestation: SIMULATED")
            assert "; hop 2 attestation: SIMULATED" in client.attestation.line
        assert second.arrived.num_tensors > 0
        table = own.model_dump(mode="json", exclude_defaults=True)
        del table["hops"][1]["tee"]
        table["run"]["folder"] += "-unproved"
        with Client(parse_settings(ClientSettings, table, "test client")) as client:
            # A chain is worth what its least hop is.
            assert client.attestation is not None
            assert client.attestation.label == "none"


def test_a_server_before_an_attested_enclave(world: AttestedWorld, tmp_path: Path) -> None:
    with _hop(world, 1, 2) as middle, attested_enclave(world, model__lower=2) as inside:
        settings = attested_owner(world, inside.port, tmp_path / "a", sampling__max_new_tokens=8)
        table = settings.model_dump(mode="json", exclude_defaults=True)
        table["labels"] = "enclave"
        hop = {
            "lower": 1,
            "upper": 2,
            "connection": {"address": f"127.0.0.1:{middle.port}", "codec": "raw"},
            "tee": {"policy": str(world.policy())},
            "privacy": {"mechanism": "none"},
        }
        table["hops"] = [hop]
        with EnclaveClient(parse_settings(EnclaveClientSettings, table, "test owner")) as owner:
            history = owner.train().history
            assert history[-1].loss < history[0].loss
            assert "hop 1 attestation: SIMULATED" in owner.guarantee
            assert "hop 2 attestation: SIMULATED" in owner.guarantee
            assert owner.guarantee.endswith("hop 1 noise: no noise: none")
            assert len(owner.generate(["ab:"])) == 1
