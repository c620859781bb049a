"""One attempt of a round: what members and server must agree on before a mask is made.

It holds no secret. Everything that is signed, derived or encrypted in an attempt is bound to it,
so nothing of one attempt, cohort or policy is accepted in another.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from cutlayer.federation.cuts import Cuts, write_cuts
from cutlayer.federation.secure.graph import Graph, degree_for, threshold_for
from cutlayer.federation.settings import SecureSettings
from cutlayer.federation.state import Layout

__all__ = ["Attempt"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Which federation, round and attempt, with whom, by which rules."""

    federation: str
    round: int
    attempt: int
    cohort: Sequence[str]
    """Who was asked, those included who never answered."""
    policy: SecureSettings
    cuts: Cuts = field(default_factory=dict)
    """Where each of the cohort is cut; empty where all have one cut."""
    vector: Layout = field(default_factory=dict)
    """What each of the cohort masks; bound only where cuts differ. There it follows from a state
    that the server tells, and an update laid out in another way would meet zeros of all others."""

    def binding(self, purpose: str, *parts: str | bytes) -> bytes:
        """Unambiguous bytes of a purpose in this attempt.

        Args:
            purpose: what the bytes are signed, derived or encrypted for.
            parts: what else they belong to, such as two names.
        """
        return msgspec.msgpack.encode(
            ["cutlayer secure aggregation", purpose, *self._agreed, *parts]
        )

    @cached_property
    def graph(self) -> Graph:
        """Who shares masks with whom.

        Raises:
            QuorumNotMet: fewer than three members.
            ProtocolError: a name appears twice.
        """
        degree = degree_for(len(self.cohort), self.policy.threshold, self.policy.neighbours)
        return Graph(self.cohort, degree, self.binding("graph"))

    @cached_property
    def threshold(self) -> int:
        """Holders of a secret that open it; a member is a holder of its own."""
        return threshold_for(self.graph.degree, self.policy.threshold)

    @cached_property
    def _agreed(self) -> tuple[str, int, int, bytes]:
        terms: list[object] = [sorted(self.cohort), self.policy.model_dump(mode="json")]
        if self.cuts:
            terms += [write_cuts(self.cuts), sorted(self.vector.items())]
        told = msgspec.json.encode(terms)
        return self.federation, self.round, self.attempt, hashlib.sha256(told).digest()
