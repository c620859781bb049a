"""One scenario in this process: a real server, real members in threads, and faults between them.

A member is killed by ending its thread wherever it calls the server; a server by taking a copy of
its state folder between two writes, and opening a new one on the copy. It judges nothing.
"""

import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.fault_channel import FaultyChannel, Killed, Script
from benchmarks.fault_evidence import Ending, Evidence, read_store, saved_ends
from benchmarks.fault_plan import LEAST, SERVER, Deed, Fault, Mode, Plan
from benchmarks.fault_settings import World, client_settings, rules_of, server_settings
from benchmarks.fault_witness import MortalStore, Notes, notes_of
from cutlayer import Client, TrunkServer
from cutlayer.client.membership import joined_states
from cutlayer.errors import CutlayerError, PermissionRefused, TransportError
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.model.adapters import AdapterState
from cutlayer.server.federation import federation_folder
from cutlayer.wire.channel import Channel, LoopbackChannel, Peer

__all__ = ["Scenario", "run_in_threads"]

HUNG_S = 45.0
"""Every scenario ends long before, if nothing waits for ever."""
_POLL_S = 0.05
_WAITS_S = 3.0
_ROLES = frozenset({"train", "generate"})
_Sides = dict[str, Client]


class Scenario:
    """Everything that runs; used once."""

    def __init__(self, plan: Plan, folder: Path, model: Path) -> None:
        """Make files and settings; nothing runs yet."""
        self.plan = plan
        self.world = World(plan=plan, folder=folder, model=model)
        self.notes: Notes = notes_of(rules_of(plan).name)
        self.notes.on_commit = self._on_commit
        self._script = Script(plan.faults, self._strike)
        self._gate = threading.Event()
        self._gate.set()
        self._lock = threading.RLock()
        self._server: TrunkServer | None = None
        self._old: list[TrunkServer] = []
        self._channels: list[tuple[str, FaultyChannel]] = []
        self._num_servers = 0
        self._is_over = False
        self._before_rollback: Path | None = None
        self._backups: list[Path] = []
        self._endings: dict[str, Ending] = {}
        self._threads: dict[str, threading.Thread] = {}

    def run(self) -> Evidence:
        """From the first member to the last one's end."""
        if self.plan.mode is Mode.HIDDEN:
            GroupKey.create(self.world.group_key)
        self._start_server(self._next_folder())
        clients = {name: self._open(name) for name in self.plan.members}
        for name, client in clients.items():
            thread = threading.Thread(
                target=self._live, args=(name, client), name=f"{self.notes_name}/{name}"
            )
            thread.daemon = True
            self._threads[name] = thread
            thread.start()
        self._wait()
        return self._evidence()

    @property
    def notes_name(self) -> str:
        """The federation."""
        return rules_of(self.plan).name

    # -- members

    def _open(self, name: str) -> Client:
        return Client(client_settings(self.world, name), connect=lambda: self._connect(name))

    def _connect(self, name: str) -> Channel:
        with self._lock:
            if self._is_over:
                raise PermissionRefused("the scenario is over")
            link = self._script.link_of(name)
            if self._server is None or not self._gate.is_set() or link.is_cut:
                raise TransportError("the server is away")
            peer = Peer(name=name, roles=_ROLES, serial=None, address="loopback")
            inner = LoopbackChannel(self._server, peer)
            channel = FaultyChannel(inner, name, self._script, self._gate)
            self._channels.append((name, channel))
            return channel

    def _live(self, name: str, client: Client | None) -> None:
        """One member until it finishes, is refused or is gone for good."""
        for fault in self.plan.faults:
            if fault.victim == name and fault.deed is Deed.LATE:
                time.sleep(fault.seconds)
        while True:
            try:
                client = client or self._open(name)
                self._endings[name] = self._trained(client)
                return
            except Killed as kill:
                self._bury(name, kill.fault, client)
                if not kill.fault.returns:
                    self._endings[name] = Ending(outcome="gone")
                    return
                client = None
                time.sleep(kill.fault.seconds)
            except CutlayerError as error:
                self._endings[name] = Ending(
                    outcome="refused", error=type(error).__name__, message=str(error)
                )
                return
            except BaseException as error:
                said = "".join(traceback.format_exception(error)[-3:])
                self._endings[name] = Ending(
                    outcome="broke", error=type(error).__name__, message=said
                )
                return
            finally:
                if client is not None:
                    client.close()

    def _trained(self, client: Client) -> Ending:
        client.train()
        held: AdapterState = joined_states(client._parts.adapter_states())
        saved = saved_ends(client.settings.run.folder, self.plan.rounds)
        same = saved is not None and all(torch.equal(x, saved[key]) for key, x in held.items())
        return Ending(outcome="finished", ends=saved, state_equals_saved=same)

    def _bury(self, name: str, fault: Fault, client: Client | None) -> None:
        """A process that ends closes its connections, unless the whole machine went."""
        for owner, channel in list(self._channels):
            if owner == name and fault.deed is Deed.VANISH:
                channel.vanish()
            elif owner == name:
                channel.break_off()
        if client is not None:
            client.close()

    # -- the server

    def _next_folder(self) -> Path:
        self._num_servers += 1
        return self.world.folder / f"server{self._num_servers}"

    def _start_server(self, folder: Path) -> None:
        server = TrunkServer(server_settings(self.world, folder))
        with self._lock:
            self._server = server

    def _strike(self, fault: Fault) -> None:
        if fault.deed is Deed.PAUSE:
            self._gate.clear()
            _later(fault.seconds, self._gate.set)
        elif fault.deed is Deed.SLOW:
            for name in self.plan.members:
                self._script.link_of(name).slow_until_s = time.monotonic() + fault.seconds
        elif fault.deed is Deed.ROLLBACK and self._backups:
            self._crash(fault, self._backups[0])
        elif fault.deed in (Deed.KILL, Deed.ROLLBACK):
            self._crash(fault, None)

    def _on_commit(self, stage: str, round_number: int) -> None:
        """On the coordinator's thread, in the middle of a commit."""
        for fault in self._script.met(SERVER, stage):
            self._strike(fault)
        if stage == "after row" and any(f.deed is Deed.ROLLBACK for f in self.plan.faults):
            store = self._store()
            if store is not None and not store.is_dead:
                backup = self.world.folder / f"backup{len(self._backups)}"
                shutil.copytree(store.folder.parents[1], backup)
                self._backups.append(backup)

    def _store(self) -> MortalStore | None:
        server = self._server
        if server is None or server.federation is None:
            return None
        store = server.federation.store
        assert isinstance(store, MortalStore)
        return store

    def _crash(self, fault: Fault, backup: Path | None) -> None:
        """What is on disk now is all that is left."""
        store = self._store()
        if store is None:
            return
        with store.lock:
            with self._lock:
                if self._server is None or self._is_over:
                    return
                self._old.append(self._server)
                self._server = None
                folder = self._next_folder()
            store.is_dead = True
            shutil.copytree(backup or store.folder.parents[1], folder)
            if backup is not None:
                self._before_rollback = folder.with_name("before")
                shutil.copytree(store.folder, self._before_rollback, dirs_exist_ok=True)
        for _, channel in list(self._channels):
            channel.break_off(tells=False)
        _later(fault.seconds, lambda: self._start_server(folder))

    # -- the end

    def _wait(self) -> None:
        deadline_s, few_since_s = time.monotonic() + HUNG_S, None
        while any(thread.is_alive() for thread in self._threads.values()):
            now_s = time.monotonic()
            if now_s > deadline_s:
                self._note_hung()
                break
            few_since_s = (few_since_s or now_s) if self._are_too_few() else None
            if few_since_s is not None and now_s - few_since_s > _WAITS_S:
                break
            time.sleep(_POLL_S)
        self._stop()

    def _are_too_few(self) -> bool:
        """No round can be any more; whoever is left waits for others, as it should."""
        num_alive = sum(thread.is_alive() for thread in self._threads.values())
        store = self._store()
        return num_alive < LEAST and store is not None and store.round < self.plan.rounds

    def _note_hung(self) -> None:
        frames = sys._current_frames()
        for name, thread in self._threads.items():
            if thread.is_alive():
                stack = traceback.format_stack(frames[thread.ident or 0])
                where = " | ".join(line.strip().split("\n")[0] for line in stack[-6:])
                self._endings[name] = Ending(outcome="hung", message=where)

    def _stop(self) -> None:
        """The operator ends the federation: whoever still waits is told so."""
        hung = {name for name, end in self._endings.items() if end.outcome == "hung"}
        with self._lock:
            self._is_over = True
        self._gate.set()
        for _, channel in list(self._channels):
            channel.break_off()
        for name, thread in self._threads.items():
            thread.join(0.0 if name in hung else 10.0)
        for server in [*self._old, *([self._server] if self._server else [])]:
            server.stop(grace_s=0)

    def _evidence(self) -> Evidence:
        rules = rules_of(self.plan)
        folder = federation_folder(self.world.folder / f"server{self._num_servers}", rules.name)
        store, before = read_store(folder), self._before_rollback
        key = GroupKey.read(self.world.group_key) if self.plan.mode is Mode.HIDDEN else None
        for name in self.plan.members:
            self._endings.setdefault(name, Ending(outcome="hung", message="did not end at last"))
        return Evidence(
            rules=rules,
            victims=self.plan.victims,
            trunk_layout=self._trunk_layout(),
            group_key=key,
            endings=self._endings,
            sent=self.notes.sent,
            trunk=self.notes.trunk,
            store=store,
            store_before=None if before is None else read_store(before),
            happened=tuple(str(fault) for fault in self._script.done),
        )

    def _trunk_layout(self) -> dict[str, list[int]]:
        for server in [*([self._server] if self._server else []), *self._old]:
            if server.federation is not None:
                layout = server._host.adapter_layout(rules_of(self.plan).round_adapter())
                return {key: list(shape) for key, shape in layout.items()}
        return {}


def run_in_threads(plan: Plan, folder: Path, model: Path) -> Evidence:
    """Run one scenario.

    Args:
        plan: what goes wrong.
        folder: private and empty.
        model: of all sides.
    """
    return Scenario(plan, folder, model).run()


def _later(seconds: float, do: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()
