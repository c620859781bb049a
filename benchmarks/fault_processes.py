"""One scenario with real processes: `cutlayer serve`, `cutlayer train`, mutual TLS and signals.

Members reach the server through a proxy that can be slowed, stopped and killed. Nothing watches
inside the processes: what members must have sent is computed anew by `fault_twin`. It judges
nothing.
"""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from benchmarks.fault_evidence import Ending, Evidence, read_store, saved_ends
from benchmarks.fault_plan import REAL_STAGES, Deed, Fault, Mode, Plan
from benchmarks.fault_settings import World, client_settings, rules_of, server_settings
from benchmarks.link import LINK_PROFILES, DelayingProxy, LinkProfile
from benchmarks.recovery import start
from cutlayer.errors import EXIT_CODES, CutlayerError, StorageError
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.federation.store import FederationStore
from cutlayer.identity.provision import local
from cutlayer.model.adapters import layout_of
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.server.federation import federation_folder
from cutlayer.simulation.settings_text import settings_text

__all__ = ["run_in_processes"]

_END_S = 240.0
_POLL_S = 0.05
_SLOW_LINK = LinkProfile(rtt_ms=300.0, rate_mbit_per_s=5.0)
_ERRORS = {code: error.__name__ for error, code in EXIT_CODES.items()}
Process = subprocess.Popen[bytes]


class _Parties:
    """Server, proxy and members; everything is dead when the block ends."""

    def __init__(self, world: World, server_port: int, num_replicas: int) -> None:
        self.world = world
        self._folder = world.folder
        self._server_port = server_port
        own = replace(world, address=f"127.0.0.1:{server_port}")
        text = settings_text(server_settings(own, self._folder / "server", num_replicas))
        self._config("server").write_text(text)
        self.server = self._start("serve", "server")
        self.proxy = DelayingProxy(server_port, LINK_PROFILES["loopback"])
        self.port = self.proxy.port
        at = replace(world, address=f"localhost:{self.port}")
        for name in world.plan.members:
            self._config(name).write_text(settings_text(client_settings(at, name)))
        self.members = {name: self._start("train", name) for name in world.plan.members}

    def kill(self, victim: str, seconds: float) -> None:
        """SIGKILL, and another process after a while."""
        if victim == "replica":
            for replica in _children(self.server)[:1]:
                replica.kill()
            return
        process = self.members.get(victim, self.server)
        process.kill()
        process.wait()
        time.sleep(seconds)
        if victim in self.members:
            self.members[victim] = self._start("train", victim)
        else:
            self.server = self._start("serve", "server")

    def pause(self, victim: str, seconds: float) -> None:
        """SIGSTOP, and on again."""
        process = self.members.get(victim, self.server)
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)

    def hold_proxy(self, seconds: float) -> None:
        """Nothing crosses, and nobody is told."""
        self.proxy._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.proxy._process.send_signal(signal.SIGCONT)

    def break_proxy(self, seconds: float) -> None:
        """Every connection breaks; a new proxy takes the old one's place."""
        self.proxy._process.kill()
        self.proxy._process.wait()
        time.sleep(seconds)
        self.proxy = DelayingProxy(self._server_port, LINK_PROFILES["loopback"], port=self.port)

    def close(self) -> None:
        """Kill what is left."""
        for process in (self.server, *self.members.values()):
            for child in _children(process):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            process.kill()
            process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.proxy.close()

    def _config(self, name: str) -> Path:
        return self._folder / f"{name}.toml"

    def _start(self, command: str, name: str) -> Process:
        return start(command, self._config(name), self._folder / f"{name}.log")


def run_in_processes(plan: Plan, folder: Path, model: Path) -> Evidence:
    """Run one scenario.

    Args:
        plan: what goes wrong.
        folder: private and empty.
        model: of all sides.
    """
    keys = local(folder / "keys", plan.members)
    world = World(plan=plan, folder=folder, model=model, keys=keys)
    if plan.mode is Mode.HIDDEN:
        GroupKey.create(world.group_key)
    num_replicas = 2 if any(fault.victim == "replica" for fault in plan.faults) else 0
    with contextlib.closing(_Parties(world, _free_port(), num_replicas)) as parties:
        deadline_s, happened = time.monotonic() + _END_S, []
        for fault in plan.faults:
            _wait_for(partial(_has_come, world, fault.stage), deadline_s)
            time.sleep(0.3 * fault.pick)
            _DEEDS[fault.deed](parties, fault)
            happened.append(str(fault))
        _wait_for(lambda: not any(p.poll() is None for p in parties.members.values()), deadline_s)
        endings = {name: _ending(world, name, p) for name, p in parties.members.items()}
        _stop(parties.server)
    return _evidence(world, endings, tuple(happened))


_DEEDS: dict[Deed, Callable[[_Parties, Fault], None]] = {
    Deed.KILL: lambda parties, fault: parties.kill(fault.victim, fault.seconds),
    Deed.PAUSE: lambda parties, fault: parties.pause(fault.victim, fault.seconds),
    Deed.PARTITION: lambda parties, fault: parties.hold_proxy(fault.seconds),
    Deed.BREAK: lambda parties, fault: parties.break_proxy(fault.seconds),
    Deed.SLOW: lambda parties, fault: parties.proxy.set_link(_SLOW_LINK),
}


def _has_come(world: World, stage: str) -> bool:
    """Whether the federation has got as far as that, seen through its store."""
    name = rules_of(world.plan).name
    try:
        reader = FederationStore.read_only(federation_folder(world.folder / "server", name))
    except StorageError:
        return False
    try:
        reached = (bool(reader.members()), bool(reader.attempts()), False, reader.round >= 1)
    except (CutlayerError, ValueError):
        return False
    finally:
        reader.close()
    at = REAL_STAGES.index(stage)
    # Training is not seen from outside: it follows soon after the attempt begins.
    return reached[1] if stage == "TRAINING" else any(reached[at:])


def _wait_for(is_true: Callable[[], bool], deadline_s: float) -> None:
    while not is_true() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _ending(world: World, name: str, process: Process) -> Ending:
    code = process.poll()
    log = (world.folder / f"{name}.log").read_text(errors="replace")
    said = " / ".join(log.splitlines()[-4:])
    if code is None:
        return Ending(outcome="hung", message=said)
    if code == 0:
        run = client_settings(world, name).run.folder
        return Ending(outcome="finished", ends=saved_ends(run, world.plan.rounds))
    error = _ERRORS.get(code, "")
    outcome = "refused" if error not in ("", "CutlayerError") else "broke"
    return Ending(outcome=outcome, error=error or f"exit code {code}", message=said)


def _evidence(world: World, endings: dict[str, Ending], happened: tuple[str, ...]) -> Evidence:
    rules = rules_of(world.plan)
    trunk = load_part(resolve_model(str(world.model)), Cut(1, 3), Part.TRUNK, "float32", "cpu")
    assert isinstance(trunk, Trunk)
    hidden = world.plan.mode is Mode.HIDDEN
    return Evidence(
        rules=rules,
        victims=world.plan.victims,
        trunk_layout=layout_of(trunk, rules.round_adapter()),
        group_key=GroupKey.read(world.group_key) if hidden else None,
        endings=endings,
        store=read_store(federation_folder(world.folder / "server", rules.name)),
        happened=happened,
    )


def _stop(process: Process) -> None:
    process.terminate()
    try:
        process.wait(20.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _children(process: Process) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.Error:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
