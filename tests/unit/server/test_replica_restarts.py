"""Replicas that cannot be started: another try later, and never without a pause."""

import errno
import subprocess
import time
from pathlib import Path

import pytest

from cutlayer.errors import TransportError
from cutlayer.server.admin_keys import make_admin_keys
from cutlayer.server.launchers import Launched, LocalProcesses
from cutlayer.server.replica_group import ReplicaGroup
from cutlayer.server.replica_settings import ReplicaSettings
from cutlayer.storage.files import private_folder
from cutlayer.wire.channel import Channel
from tests.unit.server.test_replica_plan import front


class _Broken:
    """Starts nothing, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.num_asked = 0

    def launch(self, index: int) -> Launched:
        self.num_asked += 1
        raise TransportError("no memory")

    def close(self) -> None:
        """Nothing to give back."""


def _no_channel(address: str) -> Channel:
    raise TransportError(f"nobody at {address}")


def test_pause_grows_although_the_settings_have_none() -> None:
    launcher = _Broken()
    group = ReplicaGroup(launcher, ReplicaSettings(count=1, restart_delay_s=0), _no_channel)
    (slot,), began_s = group._slots, time.monotonic()
    while launcher.num_asked < 2:
        group._begin_again(slot)
    assert time.monotonic() - began_s >= 0.5
    assert slot.delay_s >= 1.0


def test_host_without_resources_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = LocalProcesses(front(tmp_path), make_admin_keys(private_folder(tmp_path / "keys")))

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(TransportError, match="Too many open files"):
        launcher.launch(0)
