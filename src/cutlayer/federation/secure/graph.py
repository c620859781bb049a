"""Who shares masks and secrets with whom: a regular graph over the cohort.

It does not choose the cohort. The graph is a function of the cohort and of a binding that both
sides know, so a member computes its neighbours itself and a server cannot choose them.

Source: Bell, Bonawitz, Gascon, Lepoint, Raykova, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead" (CCS 2020), sections 3.2 and 3.3: a Harary graph over a random order.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from math import ceil, comb

from cutlayer.errors import ProtocolError, QuorumNotMet

__all__ = ["MIN_COHORT", "Graph", "degree_for", "threshold_for"]

MIN_COHORT = 3
"""With two members each would know the other's update from the sum."""

_MIN_DEGREE = 32
"""Cohorts up to 33 have complete graphs, against which a lying server can do least."""
_FAILURE_BITS = 10
"""An attempt in which `_DROPPING` of the cohort vanish fails with less than 2^-10."""
_SECURITY_BITS = 40
"""A secret is open to the server and its helpers with less than 2^-40."""
_DROPPING = 10
"""Members that may vanish, in hundredths of the cohort."""
_CURIOUS = 10
"""Members that may tell a server that follows the protocol all they know, in hundredths."""
_LYING = 2
"""Members that may help a server that lies, in hundredths."""


class Graph:
    """A regular graph over a cohort; the same for everybody who knows cohort and binding."""

    def __init__(self, cohort: Sequence[str], degree: int, binding: bytes) -> None:
        """Order the cohort by a hash and join each member with those around it.

        Args:
            cohort: the members' names.
            degree: neighbours of each; even, unless all others are.
            binding: names federation, round and attempt.

        Raises:
            QuorumNotMet: fewer than three members.
            ProtocolError: a name appears twice.
        """
        if len(cohort) < MIN_COHORT:
            raise QuorumNotMet(
                f"secure aggregation needs {MIN_COHORT} members, the cohort has {len(cohort)}"
            )
        if len(set(cohort)) != len(cohort):
            raise ProtocolError("a member appears twice in the cohort")
        self.degree = degree
        self._order = sorted(cohort, key=lambda name: _place(binding, name))
        self._position = {name: place for place, name in enumerate(self._order)}

    def neighbours(self, name: str) -> tuple[str, ...]:
        """The members that `name` shares masks with, sorted.

        Raises:
            ProtocolError: it is not in the cohort.
        """
        place, size = self._place_of(name), len(self._order)
        if self.degree >= size - 1:
            return tuple(sorted(other for other in self._order if other != name))
        steps = range(1, self.degree // 2 + 1)
        around = {(place + sign * step) % size for step in steps for sign in (-1, 1)}
        return tuple(sorted(self._order[other] for other in around))

    def holders(self, name: str) -> tuple[str, ...]:
        """Who holds shares of its secrets: its neighbours and itself, sorted."""
        return tuple(sorted((*self.neighbours(name), name)))

    def _place_of(self, name: str) -> int:
        if name not in self._position:
            raise ProtocolError(f"{name[:63]!r} is not in the cohort of this round")
        return self._position[name]


def threshold_for(degree: int, share: float) -> int:
    """How many of the `degree + 1` holders open a secret; never fewer than three.

    Args:
        degree: neighbours of a member; the member itself is a holder too.
        share: part of the holders, above a half.
    """
    # A float product may end just above the integer that is meant.
    return max(MIN_COHORT, ceil(share * (degree + 1) - 1e-9))


@lru_cache(maxsize=256)
def degree_for(num_members: int, share: float, wanted: int | None) -> int:
    """Neighbours of each member; O(log N), all others in a small cohort.

    The smallest even k from 32 with, for t = ceil(share * (k + 1)), bad members placed at random
    and N times the probability for one member (union bound):

        10 % vanish:            P[more than k + 1 - t neighbours vanish]    < 2^-10
        10 % tell all:          P[at least t neighbours tell]               < 2^-40
        2 % help a lying server: P[at least 2t - k - 1 neighbours help]     < 2^-40

    Args:
        num_members: N, the cohort's size.
        share: of the holders that open a secret.
        wanted: k as set, which is taken up to the next even number; None computes it.

    Source: Bell et al. (CCS 2020), section 3.4, definition 3.5; hypergeometric tails.
    """
    most = num_members - 1
    if wanted is not None:
        return min(wanted + wanted % 2, most)
    for degree in range(_MIN_DEGREE, most, 2):
        if _is_enough(num_members, degree, threshold_for(degree, share)):
            return degree
    return most


def _is_enough(num_members: int, degree: int, threshold: int) -> bool:
    needs = (
        (_DROPPING, degree + 2 - threshold, _FAILURE_BITS),
        (_CURIOUS, threshold, _SECURITY_BITS),
        (_LYING, 2 * threshold - degree - 1, _SECURITY_BITS),
    )
    return all(
        _is_rare(num_members, num_members * percent // 100, degree, least, bits)
        for percent, least, bits in needs
    )


def _is_rare(num_members: int, num_bad: int, degree: int, least: int, bits: int) -> bool:
    """Whether N * P[at least `least` of a member's neighbours are bad] < 2^-bits, exactly."""
    others, most = num_members - 1, min(degree, num_bad)
    ways = sum(
        comb(num_bad, bad) * comb(others - num_bad, degree - bad) for bad in range(least, most + 1)
    )
    return num_members * ways << bits < comb(others, degree)


def _place(binding: bytes, name: str) -> bytes:
    return hashlib.sha256(binding + hashlib.sha256(name.encode()).digest()).digest()
