"""Replicas as real Ray actors, and a Ray that does not come up."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest


def test_a_run_on_ray_actors_survives_the_death_of_its_actor(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "tests.integration.ray_survival", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_ray_that_does_not_come_up_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_launcher = pytest.importorskip("cutlayer.server.ray_launcher")
    started: list[subprocess.Popen[bytes]] = []

    def half_way(**options: object) -> None:
        started.append(subprocess.Popen(["sleep", "60"]))
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray_launcher.ray, "init", half_way)
    with pytest.raises(ray_launcher._NotUp, match=r"timed out during startup\.$"):
        ray_launcher._init("local", {})
    assert not psutil.pid_exists(started[0].pid)
    started[0].wait()
