"""A confined worker: what it gave up really fails, in every thread, and its work goes on."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from cutlayer.errors import ConfigError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.process import confine as room
from cutlayer.tee.process.confine import ConfinementSettings, confine, confine_files
from cutlayer.tee.process.landlock import landlock_abi
from cutlayer.tee.process.secret import has_secret_memory
from tests.unit.tee.process.confined_worker import KEY

SCRIPT = Path(__file__).with_name("confined_worker.py")
ROOT = Path(__file__).parents[4]
IS_ROOT = os.geteuid() == 0
UID = 54321 if IS_ROOT else 0
"""What the worker becomes; only root gives a process another user."""
EPERM, EACCES = os.strerror(1), os.strerror(13)
BY_NUMBER = frozenset(
    {
        "bpf",
        "dumpable by a wide number",
        "io_uring_setup",
        "perf_event_open",
        "process_vm_readv",
        "ptrace",
        "type by a wide number",
        "unshare",
        "userfaultfd",
    }
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="system calls of Linux")
needs_landlock = pytest.mark.skipif(landlock_abi() == 0, reason="this kernel has no Landlock")


@dataclass(frozen=True)
class Worker:
    """A running child and what it said of itself."""

    pid: int
    facts: dict[str, Any]

    def call(self, what: bytes) -> Any:
        """Ask it over gRPC, which it answers in a thread of its pool."""
        with grpc.insecure_channel(f"127.0.0.1:{self.facts['port']}") as channel:
            return json.loads(channel.unary_unary("/worker/do")(what, timeout=30))


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    # Not pytest's own folder: only its owner may enter that.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for name in ("model", "state", "other"):
        (folder / name).mkdir()
    (folder / "model" / "seed").write_text("7")
    (folder / "other" / "file").write_text("not for the worker")
    for path in (folder / "state", folder / "other", folder / "other" / "file"):
        os.chown(path, UID or os.getuid(), -1)
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "GRPC_VERBOSITY": "NONE"}
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), str(UID)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield Worker(child.pid, json.loads(child.stdout.readline()))
    finally:
        child.stdin.close()
        child.wait(timeout=30)
        child.stdout.close()
        shutil.rmtree(folder)
    assert child.returncode == 0


def _is_tested(name: str) -> bool:
    return platform.machine() == "x86_64" or name not in BY_NUMBER


def test_what_was_given_up_fails_in_the_main_thread(worker: Worker) -> None:
    tried = {name: got for name, got in worker.facts["main"].items() if _is_tested(name)}
    if landlock_abi() == 0:
        tried = {name: got for name, got in tried.items() if "another" not in name}
    assert "done" not in tried.values(), tried
    for name in ("socket", "exec", "fork", "bpf", "io_uring_setup"):
        assert tried.get(name, EPERM) == EPERM


@needs_landlock
def test_what_was_given_up_fails_in_threads_that_were_there_before(worker: Worker) -> None:
    tried = worker.call(b"try")
    assert tried["socket"] == tried["exec"] == tried["fork"] == EPERM
    assert tried["read another file"] == tried["list another folder"] == EACCES
    assert tried["write into the model"] == EACCES
    assert tried["dumpable again"] == EPERM
    if landlock_abi() >= 7:
        assert tried["signal to the parent"] == EPERM


def test_neither_dumps_nor_the_terminal_are_reached_around_the_filter(worker: Worker) -> None:
    tried = {name: got for name, got in worker.facts["main"].items() if _is_tested(name)}
    around = {name for name in tried if "wide number" in name} | {"type into the terminal"}
    assert {name: tried[name] for name in around} == dict.fromkeys(around, EPERM)


def test_the_work_goes_on(worker: Worker) -> None:
    assert worker.call(b"work") == worker.call(b"work")


def test_the_report_says_simulated_and_what_the_kernel_says(worker: Worker) -> None:
    details = worker.facts["details"]
    assert worker.facts["lines"][0].startswith("SIMULATED")
    assert details["confinement"] == "SIMULATED"
    assert details["no_dumps"] == details["no_new_privileges"] == "yes"
    assert int(details["seccomp_rules"]) > 50
    assert details["landlock_abi"] == str(landlock_abi())
    assert details["free_threads"] == "0"
    status = Path(f"/proc/{worker.pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a process another user")
def test_the_worker_is_not_root(worker: Worker) -> None:
    status = Path(f"/proc/{worker.pid}/status").read_text()
    assert "Uid:\t" + "\t".join(["54321"] * 4) in status
    assert "CapEff:\t0000000000000000" in status


@pytest.mark.skipif(not has_secret_memory(), reason="this kernel has no memfd_secret")
@pytest.mark.skipif(not IS_ROOT, reason="others cannot read any of a process's memory")
def test_root_reads_ordinary_memory_but_not_the_hidden_key(worker: Worker) -> None:
    places = worker.facts["places"]
    with open(f"/proc/{worker.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(places["plain"])
        assert memory.read(len(KEY)) == KEY
        memory.seek(places["secret"])
        with pytest.raises(OSError, match="Input/output error"):
            memory.read(len(KEY))


def test_a_folder_of_another_user_is_refused_before_anything_is_given_up(tmp_path: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root changes users")
    settings = ConfinementSettings(writable=[tmp_path], uid=54321, lock_memory=False)
    with pytest.raises(ConfigError, match="chown -R 54321"):
        room._check_owners(settings)


def test_without_pyseccomp_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    for call in (confine, confine_files):
        with pytest.raises(ConfigError, match=r"cutlayer\[tee\]"):
            call(ConfinementSettings())


def test_a_missing_writable_folder_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for call in (confine, confine_files):
        with pytest.raises(ConfigError, match="gone does not exist"):
            call(ConfinementSettings(writable=[gone]))


def _in_a_process(script: str) -> str:
    """What a script prints that confines itself; it has no torch, so that it is quick."""
    start = (
        "import threading, time, resource\n"
        "from cutlayer.errors import ConfigError\n"
        "from cutlayer.tee.process.confine import ConfinementSettings, confine, confine_files\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + script], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_required_and_cannot_be_had_is_an_error() -> None:
    # Either the limit holds, or this is root, who names no user to become.
    said = _in_a_process(
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "try:\n    confine(ConfinementSettings(required=True))\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    assert "cannot be confined as required" in said
    assert "locked memory" in said or "own user" in said


@needs_landlock
def test_threads_that_no_rule_binds_are_counted_and_named() -> None:
    thread = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    report = "report = confine(ConfinementSettings({}){})\n"
    tell = "print(report.num_free_threads, *report.missing)\n"
    late = _in_a_process(thread + report.format("", "") + tell)
    if landlock_abi() < 8:
        assert late.startswith("1 ")
        assert "call confine_files before they start" in late
    early = "is_early = confine_files(ConfinementSettings())\n"
    assert _in_a_process(early + thread + report.format("", ", is_early") + tell).startswith("0 ")


@needs_landlock
def test_the_folder_of_the_start_is_not_readable_for_that(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("private")
    script = (
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, os.getcwd())\n"
        "confine_files(ConfinementSettings(seccomp=False))\n"
        "try:\n    print(open('letter').read())\nexcept OSError as error:\n    print(error)\n"
    )
    assert "Permission denied" in _in_a_process(script)


def test_what_is_switched_off_is_not_applied() -> None:
    settings = "ConfinementSettings(seccomp=False, landlock=False, lock_memory=False)"
    said = _in_a_process(
        f"report = confine({settings})\n"
        "print(report.seccomp_rules, report.landlock_abi, report.is_memory_locked)\n"
        "print(report.no_dumps)\n"
    )
    assert said.split() == ["0", "0", "False", "True"]


def test_a_process_is_never_more_than_simulated() -> None:
    everything = room.Confinement(
        uid=1,
        is_root=False,
        no_new_privileges=True,
        no_dumps=True,
        seccomp_rules=80,
        landlock_abi=7,
        num_free_threads=0,
        is_memory_locked=True,
        has_secret_memory=True,
    )
    assert everything.assurance is Assurance.SIMULATED
    assert everything.details()["missing"] == "nothing"
