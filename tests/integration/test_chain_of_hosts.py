"""Two trunk hosts as processes, each with its own certificate: one a server, one another member."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from cutlayer.demo.processes import serving
from cutlayer.demo.setup import write_settings
from cutlayer.identity.authority import approve, open_authority
from cutlayer.identity.certificates import MemberKind
from cutlayer.identity.install import install
from cutlayer.identity.provision import local, member_files
from cutlayer.identity.request import request
from cutlayer.settings import Settings, parse_settings
from tests.chain_worlds import chain_settings, client_of_hops, hop_server, running_hops
from tests.tiny_models import tiny_model
from tests.unit.cli.cli_world import run_command
from tests.worlds import Table


def _keys(folder: Path, host: str) -> None:
    """A kit with the role to serve, for a member that hosts blocks."""
    authority = open_authority(folder / "authority")
    asked = request(folder / host, host, MemberKind.SERVER, ("localhost", "127.0.0.1"))
    kit = approve(authority, asked.path, ["serve"], fingerprint=asked.fingerprint)
    install(kit, folder / host, authority.fingerprint)


def _tls(folder: Path) -> Table:
    files = member_files(folder)
    return {name: str(getattr(files, name)) for name in ("certificate", "key", "authority")}


def _written(settings: Settings, table: Table, path: Path) -> Path:
    write_settings(parse_settings(type(settings), table, "test"), path)
    return path


def test_an_owner_trains_generates_and_exports_over_a_server_and_a_member(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: object, code: int = 0) -> dict[str, object]:
        ran = run_command(capsys, *words, "--json")
        assert ran.code == code, ran.err
        return ran.result

    model = tiny_model("llama", tmp_path, num_hidden_layers=6)[0]
    keys = tmp_path / "keys"
    local(keys, ("alice",))
    _keys(keys, "mercy-trunk")
    with ExitStack() as stack:
        addresses = []
        for host, cut in (("server", (1, 3)), ("mercy-trunk", (3, 5))):
            table = hop_server(model, tmp_path, *cut).model_dump()
            listen = {"address": "127.0.0.1:0", "plaintext": False, "tls": _tls(keys / host)}
            table |= {"listen": listen, "revoked": str(member_files(keys / host).revoked)}
            path = _written(hop_server(model, tmp_path, *cut), table, tmp_path / f"{host}.toml")
            (tmp_path / host).mkdir()
            addresses.append(stack.enter_context(serving(path, tmp_path / host)).address)
        settings = chain_settings(model, tmp_path, places=("server", "member"))
        table = settings.model_dump(mode="json", exclude_none=True)
        table["connection"] |= {
            "plaintext": False,
            "tls": _tls(keys / "alice"),
            "address": addresses[0],
        }
        table["hops"][1]["connection"]["address"] = addresses[1]
        client = ("--config", _written(settings, table, tmp_path / "client.toml"))
        looked = command("doctor", *client)
        assert {"hop 1", "hop 2"} <= {check["name"] for check in looked["checks"]}  # type: ignore[attr-defined]
        trained = command("train", *client)
        assert trained["step"] == 6
        # What it wrote down of its settings is read again, hops and all.
        again = ("--config", tmp_path / "run" / "settings.toml")
        assert command("train", *again)["new_steps"] == 0
        few = ("--set", "sampling.max_new_tokens=4")
        said = command("generate", "ab:", *client, *few)
        assert len(said["replies"]) == 1  # type: ignore[arg-type]
        shown = command("privacy", "show", *client)
        assert set(shown["rules"]) == {  # type: ignore[call-overload]
            "lower cut",
            "gradients",
            "lower cut.hop2",
            "gradients.hop2",
        }
        assert "activations.hop2" in shown["num_vectors"]  # type: ignore[operator]
        assert command("export", *client, "-o", tmp_path / "peft")["step"] == 6
        # The hosts are who they are: one does not pass for the other.
        table["hops"][1]["connection"]["server_name"] = "trunk.example.org"
        wrong = ("--config", _written(settings, table, tmp_path / "wrong.toml"))
        refused = command("generate", "ab:", *wrong, *few, code=9)
        assert refused["error"] == "PermissionRefused"
    other = tmp_path / "loopback"
    other.mkdir()
    with (
        running_hops(model, other) as servers,
        client_of_hops(servers, chain_settings(model, other)) as owner,
    ):
        losses = [record.loss for record in owner.train().history]
    assert trained["loss_last"] == pytest.approx(losses[-1], rel=1e-5)
