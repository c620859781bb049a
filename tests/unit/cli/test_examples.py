"""The example settings load, and show every setting that exists."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from cutlayer.client.settings import ClientSettings
from cutlayer.enclave.owner_settings import EnclaveClientSettings
from cutlayer.enclave.settings import EnclaveSettings
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import Settings, load_settings

EXAMPLES = Path(__file__).parents[3] / "examples"
ROLES = [
    ("client.toml", ClientSettings),
    ("server.toml", ServerSettings),
    ("enclave-client.toml", EnclaveClientSettings),
    ("enclave-server.toml", EnclaveSettings),
]


def _keys(model: type[BaseModel], path: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        nested = [kind for kind in _types(field.annotation) if issubclass(kind, BaseModel)]
        found |= _keys(nested[0], f"{path}{name}.") if nested else {f"{path}{name}"}
    return found


def _types(annotation: object) -> list[type]:
    parts = getattr(annotation, "__args__", (annotation,))
    return [part for part in parts if isinstance(part, type)]


def _shown(path: Path) -> list[str]:
    """Keys of the file, commented-out ones too, each with its section."""
    section, found = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if header := re.fullmatch(r"(?:# )?\[{1,2}([a-z_.]+)\]{1,2}", line):
            section = f"{header[1]}."
        elif key := re.match(r"(?:# )?([a-z_0-9]+) = ", line):
            found.append(f"{section}{key[1]}")
    return found


SHAPES = [
    ("chain-client.toml", ClientSettings),
    ("shared-labels-client.toml", EnclaveClientSettings),
]


@pytest.mark.parametrize(("name", "kind"), [*ROLES, *SHAPES])
def test_the_example_loads(name: str, kind: type[Settings]) -> None:
    load_settings(kind, EXAMPLES / name)


@pytest.mark.parametrize(("name", "kind"), ROLES)
def test_the_example_shows_every_setting_once(name: str, kind: type[Settings]) -> None:
    assert sorted(_shown(EXAMPLES / name)) == sorted(_keys(kind))


@pytest.mark.parametrize("name", [name for name, _ in ROLES])
def test_every_setting_is_explained_by_a_comment_above_it(name: str) -> None:
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    for before, line in pairwise(lines):
        if re.match(r"(?:# )?[a-z_0-9]+ = ", line):
            assert before.startswith("# "), line
            assert " = " not in before, line
