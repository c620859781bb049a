"""From challenge to training step over simulated evidence; every refusal before any tensor."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer import Client
from tests.attested_worlds import AttestedWorld


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttestedWorld]:
    yield AttestedWorld.make(tmp_path_factory.mktemp("attested"))


def test_an_attested_trunk_trains_and_the_level_is_told(world: AttestedWorld) -> None:
    with world.serving() as served, Client(world.client(served.port)) as client:
        client.train()
        assert client.attestation is not None
        assert client.attestation.line.startswith("attestation: SIMULATED, by policy server")
        assert served.arrived.num_tensors > 0
