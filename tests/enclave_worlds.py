"""A small world with an enclave: one server of all later blocks, and owners with the front.

As in `worlds`, the server's real service is reached through a loopback channel, which encodes every
frame.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cutlayer.enclave.owner import EnclaveClient
from cutlayer.enclave.owner_settings import EnclaveClientSettings
from cutlayer.enclave.server import EnclaveServer
from cutlayer.enclave.settings import EnclaveSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.wire.channel import Channel, LoopbackChannel, Peer
from tests.attested_worlds import AttestedWorld, tls_of
from tests.worlds import ALL_ROLES, Table, owner_tables

__all__ = [
    "attested_enclave",
    "attested_owner",
    "enclave_settings",
    "loopback_of",
    "owner_of",
    "owner_settings",
    "running_enclave",
]

LOWER = 1


def enclave_settings(model: Path, folder: Path, **changes: object) -> EnclaveSettings:
    """An enclave of blocks 1 to 3; `changes` replace keys, such as rows__max_bytes=1000."""
    table: dict[str, Table] = {
        "model": {"path": str(model), "lower": LOWER},
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "state": {"folder": str(folder / "inside"), "key_file": str(folder / "inside.key")},
    }
    changes = {"shared_labels": True, **changes}
    return parse_settings(EnclaveSettings, _changed(table, changes), "test enclave")


def owner_settings(model: Path, folder: Path, **changes: object) -> EnclaveClientSettings:
    """An owner of block 0; `changes` replace keys, such as train__lr=0.1."""
    folder.mkdir(exist_ok=True)
    table: dict[str, Table] = {
        "model": {"path": str(model), "lower": LOWER},
        "tee": {"required": False},
        **owner_tables(folder),
    }
    return parse_settings(EnclaveClientSettings, _changed(table, changes), "test owner")


@contextmanager
def running_enclave(settings: EnclaveSettings) -> Iterator[EnclaveServer]:
    """An enclave that does not listen; reach it by `loopback_of`."""
    server = EnclaveServer(settings)
    try:
        yield server
    finally:
        server.stop(grace_s=0)


def loopback_of(
    server: EnclaveServer, name: str = "clinic", roles: frozenset[str] = ALL_ROLES
) -> Channel:
    """A channel of the owner of that name."""
    return LoopbackChannel(server, Peer(name=name, roles=roles, serial=None, address="test"))


def owner_of(
    server: EnclaveServer, settings: EnclaveClientSettings, name: str = "clinic"
) -> EnclaveClient:
    """An owner whose every connection goes to this enclave."""
    return EnclaveClient(settings, connect=lambda: loopback_of(server, name))


@contextmanager
def attested_enclave(world: AttestedWorld, **changes: object) -> Iterator[EnclaveServer]:
    """An enclave that listens, over mutual TLS, with evidence of the world's machine."""
    private_folder(world.folder / "machines")
    table = enclave_settings(world.model, world.folder, **changes).model_dump(
        mode="json", exclude_defaults=True
    )
    table["listen"] = {"address": table["listen"]["address"], "tls": tls_of(world.kits.server)}
    table["tee"] = {"attester": world.attester()}
    with running_enclave(parse_settings(EnclaveSettings, table, "test enclave")) as server:
        server.start()
        yield server


def attested_owner(
    world: AttestedWorld, port: int, folder: Path, name: str = "clinic", **changes: object
) -> EnclaveClientSettings:
    """An owner of that name who wants evidence of the world's machine."""
    own = owner_settings(world.model, folder, **changes)
    table = own.model_dump(mode="json", exclude_defaults=True)
    table["connection"] = {
        "address": f"127.0.0.1:{port}",
        "tls": tls_of(world.kits.clients[name]),
        "codec": "raw",
    }
    table["tee"] = {"policy": str(world.policy())}
    return parse_settings(EnclaveClientSettings, table, "test owner")


def _changed(table: dict[str, Table], changes: dict[str, object]) -> dict[str, object]:
    whole: dict[str, object] = dict(table)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if not key:
            whole[section] = value
            continue
        before = whole.get(section, {})
        assert isinstance(before, dict)
        whole[section] = {**before, key: value}
    return whole
