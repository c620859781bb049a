"""Method 1 across clients: attested members and an attested server, all with masked frozen layers.

Each member's ends and the server's trunk multiply outside under one-time pads; every side proves
itself to the other first, and plain updates go to that one place, which averages them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer import Client, ClientSettings, ServerSettings
from cutlayer.errors import AttestationError
from cutlayer.identity.provision import local
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.tee.masked.linear import MaskedLinear
from tests.attested_worlds import AttestedWorld, tls_of
from tests.federation_worlds import NAMES, at_once, federation, owner_settings, owners
from tests.masked_worlds import masked_table
from tests.tiny_models import tiny_llama_folder
from tests.worlds import Table, running_server, server_settings

RULES = federation(rounds=1, secure={"enabled": False})


@pytest.fixture
def masked(tmp_path: Path) -> Iterator[Table]:
    with masked_table(tmp_path) as table:
        yield table


def _world(folder: Path) -> AttestedWorld:
    kits = local(private_folder(folder / "kits"), names=NAMES)
    return AttestedWorld(folder, tiny_llama_folder(folder), kits)


def _server(world: AttestedWorld, masked: Table) -> ServerSettings:
    plain = world.server("together", client_policy=world.policy("clinics"))
    table = plain.model_dump(mode="json", exclude_defaults=True)
    table |= {"federation": RULES, "batch": {"max_clients": 1}, "masked": masked}
    return parse_settings(ServerSettings, table, "test")


def _member(
    world: AttestedWorld, port: int, name: str, masked: Table, machine: str = "clinics"
) -> ClientSettings:
    rows = 8 + 4 * NAMES.index(name)
    plain = owner_settings(
        world.model, world.folder, name, rows, federation__share_plain_updates=True
    )
    table = plain.model_dump(mode="json", exclude_defaults=True)
    tls = tls_of(world.kits.clients[name])
    table["connection"] = {"address": f"127.0.0.1:{port}", "tls": tls, "codec": "raw"}
    table["tee"] = {"policy": str(world.policy()), "attester": world.attester(machine)}
    return parse_settings(ClientSettings, table | {"masked": masked}, "test")


def _ends(client: Client) -> dict[str, Tensor]:
    states = client._parts.adapter_states()
    return {**states["head"], **states["tail"]}


def _plain_ends(folder: Path) -> dict[str, Tensor]:
    """The same federation without masks, evidence or a network."""
    folder.mkdir(mode=0o700)
    model = tiny_llama_folder(folder)
    settings = server_settings(model, folder, federation=RULES, batch={"max_clients": 1})
    with running_server(settings) as server:
        clients = owners(server, model, folder, federation__share_plain_updates=True)
        at_once([client.train for client in clients])
        ends = _ends(clients[0])
        for client in clients:
            client.close()
    return ends


def test_attested_members_train_together_over_masked_layers(tmp_path: Path, masked: Table) -> None:
    world = _world(tmp_path)
    with world.serving(_server(world, masked)) as served:
        clients = [Client(_member(world, served.port, name, masked)) for name in NAMES]
        for part in (served.server._trunk, clients[0].tail):
            assert any(isinstance(module, MaskedLinear) for module in part.modules())
        at_once([client.train for client in clients])
        ends = [_ends(client) for client in clients]
        for client in clients:
            client.close()
    wanted = _plain_ends(tmp_path / "plain")
    for key, x in wanted.items():
        for found in ends:
            assert torch.equal(found[key], ends[0][key])
        # Products are of 16-bit weights, and AdamW turns the last bits of a gradient into steps.
        assert float((ends[0][key] - x).norm()) < 5e-3 * float(x.norm()) + 1e-6


def test_a_member_on_another_machine_hands_nothing_in(tmp_path: Path, masked: Table) -> None:
    world = _world(tmp_path)
    world.machine("elsewhere")
    with world.serving(_server(world, masked)) as served:
        stranger = _member(world, served.port, "anna", masked, machine="elsewhere")
        with Client(stranger) as client, pytest.raises(AttestationError):
            client.train()
    assert served.arrived.num_tensors == 0
