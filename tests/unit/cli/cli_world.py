"""What the commands are run on in tests: a tiny model, keys and settings files of both sides."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from cutlayer.cli.main import run
from cutlayer.demo.setup import write_settings
from cutlayer.identity.provision import LocalFolders, local, member_files
from cutlayer.settings import parse_settings
from tests.worlds import client_settings, server_settings, write_rows

__all__ = ["CliWorld", "Ran", "make_world", "run_command"]

_PEERS = {"connection": "client", "listen": "server"}


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, object]:
        """The JSON object of the last stdout line."""
        value = json.loads(self.out.splitlines()[-1])
        assert isinstance(value, dict)
        return value


@dataclass(frozen=True)
class CliWorld:
    """Files of one machine with both sides."""

    folder: Path
    keys: LocalFolders
    client: Path
    server: Path


def make_world(model: Path, folder: Path, port: int = 1) -> CliWorld:
    """Keys, a client.toml that points at `port`, and a server.toml."""
    keys = local(folder / "keys")
    write_rows(folder / "rows.jsonl")
    made = {}
    for section, settings in (
        ("connection", client_settings(model, folder)),
        ("listen", server_settings(model, folder)),
    ):
        table = settings.model_dump()
        files = member_files(folder / "keys" / _PEERS[section])
        tls = {name: getattr(files, name) for name in ("certificate", "key", "authority")}
        address = f"127.0.0.1:{port if section == 'connection' else 0}"
        table[section] |= {"plaintext": False, "tls": tls, "address": address}
        if section == "listen":
            table |= {"revoked": files.revoked, "health_port": 0, "drain_s": 2.0}
        path = folder / f"{_PEERS[section]}.toml"
        write_settings(parse_settings(type(settings), table, "test"), path)
        made[section] = path
    return CliWorld(folder=folder, keys=keys, client=made["connection"], server=made["listen"])


def run_command(capsys: pytest.CaptureFixture[str], *argv: object) -> Ran:
    """Run one command line in this process."""
    capsys.readouterr()
    code = run([str(word) for word in argv])
    captured = capsys.readouterr()
    return Ran(code=code, out=captured.out, err=captured.err)
