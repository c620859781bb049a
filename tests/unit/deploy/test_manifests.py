"""Recipes that no test can run: they parse, say UNTESTED, and name what exists."""

import configparser
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

import cutlayer.tee.attesters  # noqa: F401  (registers them)
from cutlayer.cli.app import app
from cutlayer.enclave.settings import EnclaveSettings
from cutlayer.settings import parse_settings
from cutlayer.tee.attester import ATTESTERS
from cutlayer.tee.policy import read_policy

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
_REPOSITORY_PATH = re.compile(
    r"(?<![\w/.])(?:\.\./\.\./)?((?:deploy|packaging|examples|docs|tests|src)/[\w./-]*[\w-])"
)
_COMMANDS = (
    re.compile(r"(?:cutlayer |cutlayer\.cli\.main |\[)((?:[a-z-]+ )+)--config"),
    re.compile(r"`cutlayer ([^`]+)`"),
    re.compile(r"cutlayer-enclave:local ([a-z -]+)$", re.MULTILINE),
)


def _name(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def _of(*suffixes: str) -> list[Path]:
    return [path for path in FILES if path.suffix in suffixes]


def test_there_is_a_recipe_for_every_place_that_the_issue_names() -> None:
    folders = {path.name for path in DEPLOY.iterdir() if path.is_dir()}
    wanted = ("container", "confidential-vm", "gramine", "occlum", "cloud", "gpu-cc", "nitro")
    assert folders == {*wanted, "dstack", "arm-cca"}
    table = (DEPLOY / "README.md").read_text()
    assert all(f"| `{name}` |" in table for name in folders)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_recipe_says_that_nobody_ran_it(path: Path) -> None:
    if path.suffix == ".json":
        path = path.with_name("README.md")
    assert "UNTESTED" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_recipes_name_only_files_that_exist(path: Path) -> None:
    for name in _REPOSITORY_PATH.findall(path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{_name(path)} names {name}"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_recipes_name_only_commands_that_exist(path: Path) -> None:
    for words in _commands(path):
        command = typer.main.get_command(app)
        for word in words.split():
            known = getattr(command, "commands", None)
            if known is None:
                break
            assert word in known, f"{_name(path)} names cutlayer {words}"
            command = known[word]


def _commands(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8").replace('", "', " ").replace('"', "")
    return [words for pattern in _COMMANDS for words in pattern.findall(text)]


def test_commands_are_found_in_every_form() -> None:
    found = {_name(path): _commands(path) for path in FILES}
    starting = ("container/compose.yaml", "dstack/docker-compose.yaml", "nitro/start.sh")
    for name in (*starting, "gramine/cutlayer.manifest.toml", "container/enclave.Containerfile"):
        assert any("enclave serve" in words for words in found[name]), name
    assert "attest measure" in found["container/enclave.Containerfile"]


@pytest.mark.parametrize("path", _of(".toml"), ids=_name)
def test_toml_parses_and_policies_let_nothing_pass_as_they_stand(path: Path) -> None:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    if path.name.startswith("policy-"):
        policy = read_policy(path)
        values = [value for accepted in policy.measurements.values() for value in accepted]
        assert values
        assert set("".join(values)) == {"0"}
        assert policy.least_assurance == "hardware-tee"
        assert not policy.roots
    else:
        assert table["sgx"]["debug"] is False
        assert table["sgx"]["remote_attestation"] == "dcap"


@pytest.mark.parametrize("path", _of(".yaml", ".yml"), ids=_name)
def test_yaml_parses_and_containers_are_closed(path: Path) -> None:
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    for service in table.get("services", {}).values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["user"] == "10001:10001"
        assert "privileged" not in service
        if "build" in service:
            context = (path.parent / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()


def test_json_parses_and_allows_no_debugger() -> None:
    (path,) = _of(".json")
    assert json.loads(path.read_bytes())["metadata"]["debuggable"] is False


@pytest.mark.parametrize("path", _of(".service", ".conf"), ids=_name)
def test_units_and_image_definitions_parse(path: Path) -> None:
    # systemd repeats keys and has lists without values; both are its own dialect.
    parser = configparser.RawConfigParser(strict=False, allow_no_value=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path, encoding="utf-8")
    assert parser.sections()
    if path.suffix == ".service":
        service = parser["Service"]
        assert service["NoNewPrivileges"] == "yes"
        assert service["CapabilityBoundingSet"] == ""
        assert service["LimitCORE"] == "0"


def test_the_image_takes_files_that_exist() -> None:
    folder = DEPLOY / "confidential-vm"
    parser = configparser.RawConfigParser(strict=False)
    parser.read(folder / "mkosi.conf", encoding="utf-8")
    sources = [tree.partition(":")[0] for tree in parser["Content"]["ExtraTrees"].split()]
    sources.append(parser["Content"]["PostInstallationScripts"])
    # `dist` is what `make wheel` writes.
    missing = [name for name in sources if not (folder / name).exists() and name != "../../dist"]
    assert not missing


@pytest.mark.parametrize("path", _of(".Containerfile"), ids=_name)
def test_images_copy_files_that_exist_and_end_as_nobody_special(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), line
    is_root_at_the_end = re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "0:0"
    assert not is_root_at_the_end or "setpriv" in (path.parent / "start.sh").read_text()


def _settings_in(path: Path) -> Iterator[dict[str, object]]:
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("write_files", []):
        yield tomllib.loads(entry["content"])


def test_settings_within_recipes_are_accepted() -> None:
    (table,) = _settings_in(DEPLOY / "confidential-vm" / "cloud-init.yaml")
    settings = parse_settings(EnclaveSettings, table, "cloud-init.yaml")
    assert settings.tee is not None
    assert settings.tee.attester.source in ATTESTERS


def test_the_table_names_sources_that_exist() -> None:
    rows = re.findall(
        r"^\| `[\w-]+` \|.*\| `([\w-]+)` \|$", (DEPLOY / "README.md").read_text(), re.M
    )
    assert rows
    assert set(rows) <= set(ATTESTERS)
