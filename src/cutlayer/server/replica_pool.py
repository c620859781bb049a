"""A federation's trunk on several replicas: each member's part of a round is where the member is.

It implements `federation.trunk_pool.TrunkPool`. It averages nothing: members' contributions go to
the coordinator one by one, so the result is that of a single server.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from cutlayer.errors import TransportError
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.server.replica_group import Placed
from cutlayer.server.replica_link import ReplicaLink, update_of
from cutlayer.settings import settings_digest

__all__ = ["ReplicaPool", "Replicas"]

_log = logging.getLogger(__name__)
_MAX_TRIES = 10
_RETRY_S = 0.2


class Replicas(Protocol):
    """What the pool needs of `ReplicaGroup`."""

    def place(self, client: str) -> Placed:
        """A member's replica."""

    def links(self) -> list[ReplicaLink]:
        """All replicas."""


@dataclass
class _OpenRound:
    """One attempt of a round: what members start from, and where they were told."""

    adapter: AdapterSettings
    states: Mapping[str, AdapterState]
    links: dict[str, ReplicaLink] = field(default_factory=dict)


class ReplicaPool:
    """Orders of a coordinator, handed to the replicas of its members. Thread-safe."""

    def __init__(self, replicas: Replicas) -> None:
        """Nothing is open yet."""
        self._replicas = replicas
        self._rounds: dict[str, _OpenRound] = {}
        self._layouts: dict[str, Mapping[str, Sequence[int]]] = {}
        self._lock = threading.Lock()

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        """Key and shape of every adapter tensor of the trunk.

        Raises:
            TransportError: no replica is up.
        """
        name = settings_digest(adapter)
        for link in self._replicas.links() if name not in self._layouts else ():
            with suppress(TransportError):
                self._layouts[name] = link.layout(adapter)
                break
        if name not in self._layouts:
            raise TransportError("no replica of this server is up; try again soon")
        return self._layouts[name]

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """Give every member's replica the state that its run starts from.

        Whose replica is down is told later: the member greets the front again, see `follow`.
        """
        begun = _OpenRound(adapter=adapter, states=dict(states))
        with self._lock:
            self._rounds[run_id] = begun
            try:
                self._tell(run_id, begun, sorted(states))
            except TransportError as error:
                _log.warning("round %s begins without some of its members: %s", run_id, error)

    def follow(self, member: str) -> None:
        """A member was placed: its new replica learns its start state of every open round.

        Whatever the member had trained in the round on a replica that died is lost: it begins the
        round's steps again.

        Raises:
            TransportError: no replica is up.
        """
        with self._lock:
            for run_id, begun in self._rounds.items():
                if member in begun.states:
                    self._tell(run_id, begun, [member])

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """Contributions of these members; one whose replica died meanwhile is absent."""
        with self._lock:
            begun = self._rounds.get(run_id)
            links = {} if begun is None else dict(begun.links)
        asked = {
            member: links[member].start_collect(run_id, member, kind)
            for member in members
            if member in links
        }
        updates = {}
        for member, answer in asked.items():
            try:
                update = update_of(answer.result())
            except TransportError:
                continue
            if update is not None:
                updates[member] = update
        return updates

    def end_round(self, run_id: str) -> None:
        """Forget the attempt everywhere."""
        with self._lock:
            if self._rounds.pop(run_id, None) is None:
                return
        for link in self._replicas.links():
            with suppress(TransportError):  # a dead replica has forgotten it already
                link.end_round(run_id)

    def _tell(self, run_id: str, begun: _OpenRound, members: Sequence[str]) -> None:
        """Until every member's replica has taken its state: one that dies now is replaced."""
        for _ in range(_MAX_TRIES):
            links = {member: self._replicas.place(member).link for member in members}
            waiting = [m for m in members if begun.links.get(m) is not links[m]]
            if not waiting:
                return
            for group in _same_start(waiting, links, begun.states):
                self._tell_replica(run_id, begun, group, links[group[0]])
        raise TransportError("the replicas of this server do not stay up; see its log")

    def _tell_replica(
        self, run_id: str, begun: _OpenRound, members: Sequence[str], link: ReplicaLink
    ) -> None:
        try:
            link.begin_round(run_id, begun.adapter, members, begun.states[members[0]])
        except TransportError:
            # Its watcher needs a moment to see that it is dead.
            time.sleep(_RETRY_S)
        else:
            begun.links.update(dict.fromkeys(members, link))


def _same_start(
    members: Sequence[str],
    links: Mapping[str, ReplicaLink],
    states: Mapping[str, AdapterState],
) -> list[list[str]]:
    """Members that one frame can serve: on one replica, and from the very same state."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for member in members:
        same = (id(links[member]), *(id(tensor) for tensor in states[member].values()))
        groups.setdefault(same, []).append(member)
    return list(groups.values())
