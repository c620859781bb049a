"""A small federation with real keys and certificates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cutlayer.identity.authority import Authority, approve, init_authority
from cutlayer.identity.certificates import MemberKind
from cutlayer.identity.install import install
from cutlayer.identity.request import request


@dataclass
class Clock:
    """A time that tests move; it starts at the real one."""

    offset: timedelta = field(default_factory=timedelta)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.offset


@dataclass
class Federation:
    """An authority, and `join` for members."""

    folder: Path
    clock: Clock
    authority: Authority

    def join(self, name: str, kind: str = "client", days: int = 365) -> Path:
        folder = self.folder / name
        hosts = ("localhost", "127.0.0.1") if kind == "server" else ()
        asked = request(folder, name, MemberKind(kind), hosts)
        roles = ["serve"] if kind == "server" else ["train", "generate"]
        kit = approve(self.authority, asked.path, roles, days, fingerprint=asked.fingerprint)
        install(kit, folder, self.authority.fingerprint)
        return folder


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_federation(tmp_path: Path, clock: Clock) -> Callable[[str], Federation]:
    def make(name: str) -> Federation:
        authority = init_authority(tmp_path / name / "authority", name, now=clock)
        return Federation(folder=tmp_path / name, clock=clock, authority=authority)

    return make


@pytest.fixture
def federation(make_federation: Callable[[str], Federation]) -> Federation:
    return make_federation("cardiology")
