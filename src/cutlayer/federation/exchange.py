"""What members and server exchange within one attempt: in the open, or under secure aggregation.

It does not watch the clock nor decide who is too late (`running`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.federation.aggregation import Update, check_state
from cutlayer.federation.cuts import Cuts, check_shares
from cutlayer.federation.rounds import Collected
from cutlayer.federation.rules import Rules
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.peers import Verifier
from cutlayer.federation.secure.ring import dequantise
from cutlayer.federation.secure.server import SecureRound
from cutlayer.federation.state import num_values, unflatten
from cutlayer.wire.federation_messages import (
    SendUpdate,
    ShareKeys,
    ShareSecrets,
    Unmask,
    Unmasked,
    UpdateTaken,
)
from cutlayer.wire.header import Header
from cutlayer.wire.ring import bytes_of_words

__all__ = ["STAGE_OF", "Answer", "Exchange", "PlainExchange", "SecureExchange", "Stage"]


class Stage(IntEnum):
    """What an attempt waits for."""

    KEYS = 1
    SECRETS = 2
    UPDATES = 3
    UNMASK = 4
    DONE = 5


STAGE_OF: dict[type[Header], Stage] = {
    ShareKeys: Stage.KEYS,
    ShareSecrets: Stage.SECRETS,
    SendUpdate: Stage.UPDATES,
    Unmask: Stage.UNMASK,
}
"""Calls within an attempt."""


@dataclass(frozen=True)
class Answer:
    """A reply: its header and its tensors."""

    header: Header
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Exchange(Protocol):
    """Content of one attempt."""

    first: Stage
    """Where it begins."""

    def add(self, member: str, call: Header, tensors: Mapping[str, Tensor]) -> None:
        """Take what a member sent for the stage that is open.

        Raises:
            ProtocolError: it is malformed.
        """

    def is_enough(self, stage: Stage) -> bool:
        """Whether the stage may close although some are missing."""

    def close(self, stage: Stage, came: Collection[str]) -> Stage:
        """Go on with those who came; the stage that follows.

        Raises:
            QuorumNotMet, ProtocolError: it cannot go on; the attempt has failed.
        """

    def reply(self, member: str, stage: Stage) -> Answer:
        """The answer to a member that came in a stage that is closed now."""

    def result(self) -> Collected:
        """Head and tail, once done."""


class PlainExchange:
    """One call: the update as it is. The server sees every member's."""

    first = Stage.UPDATES

    def __init__(self, rules: Rules, cuts: Cuts | None = None) -> None:
        """
        Args:
            rules: of the federation.
            cuts: of the cohort, where they are mixed.
        """
        self._rules, self._cuts = rules, cuts or {}
        self._updates: dict[str, Update] = {}

    def add(self, member: str, call: Header, tensors: Mapping[str, Tensor]) -> None:
        """Check it against the layout and keep it."""
        assert isinstance(call, SendUpdate)
        check_state(member, tensors, self._rules.update(self._cuts.get(member)))
        if call.weight < 0:
            raise ProtocolError(f"update of member {member} has weight {call.weight}, below 0")
        weight = min(call.weight, self._rules.settings.secure.max_weight)
        self._updates[member] = Update(member=member, weight=weight, state=dict(tensors))

    def is_enough(self, stage: Stage) -> bool:
        """Never: all are waited for."""
        return False

    def close(self, stage: Stage, came: Collection[str]) -> Stage:
        """Done."""
        return Stage.DONE

    def reply(self, member: str, stage: Stage) -> Answer:
        """Taken; nothing to unmask."""
        return Answer(UpdateTaken(survivors=[], dropped=[], is_secure=False))

    def result(self) -> Collected:
        """All updates."""
        updates = tuple(self._updates[member] for member in sorted(self._updates))
        return Collected(
            survivors=tuple(update.member for update in updates),
            updates=updates,
            total_weight=int(sum(update.weight for update in updates)),
        )


class SecureExchange:
    """Four calls; the server learns the sum, or with a hidden aggregate not even that."""

    first = Stage.KEYS

    def __init__(self, rules: Rules, attempt: Attempt, verifier: Verifier | None = None) -> None:
        """Wait for keys.

        Raises:
            CutlayerError: as `SecureRound`.
        """
        self._rules = rules
        self._layout = attempt.vector
        self._secure = SecureRound(attempt, num_values(self._layout), verifier)
        self._has_liar = False
        self._sealed: dict[str, bytes] = {}

    def add(self, member: str, call: Header, tensors: Mapping[str, Tensor]) -> None:
        """Hand it to the protocol."""
        if isinstance(call, ShareKeys):
            self._secure.add_keys(member, call)
        elif isinstance(call, ShareSecrets):
            self._secure.add_secrets(member, call)
        elif isinstance(call, Unmask):
            self._secure.add_unmask(member, call)
        elif isinstance(call, SendUpdate):
            self._add_masked(member, tensors)

    def is_enough(self, stage: Stage) -> bool:
        """Unmasking ends as soon as the sum can be opened."""
        if stage is not Stage.UNMASK or self._has_liar or not self._secure.is_openable():
            return False
        try:
            self._secure.total()
        except ProtocolError:
            # A member lied; further answers may help, but a try is long: one more, with all.
            self._has_liar = True
        return not self._has_liar

    def close(self, stage: Stage, came: Collection[str]) -> Stage:
        """Close the protocol's step; the last one opens the sum."""
        if stage is Stage.KEYS:
            self._secure.close_keys()
        elif stage is Stage.SECRETS:
            self._secure.close_secrets()
        elif stage is Stage.UPDATES:
            self._secure.close_updates()
        else:
            self._secure.total()
        return Stage(stage + 1)

    def reply(self, member: str, stage: Stage) -> Answer:
        """What the protocol tells this member."""
        if stage is Stage.KEYS:
            return Answer(self._secure.peer_keys(member))
        if stage is Stage.SECRETS:
            return Answer(self._secure.peer_secrets(member))
        if stage is Stage.UPDATES:
            return Answer(self._secure.taken(member))
        return Answer(Unmasked())

    def result(self) -> Collected:
        """The mean; or the sum as it is where only members can remove its pads."""
        survivors, sum_M = self._secure.survivors, self._secure.total()
        if self._rules.is_hidden:
            sealed = next(iter(self._sealed.values()), b"")
            return Collected(survivors=survivors, hidden_sum=sum_M, sealed=sealed)
        policy = self._rules.settings.secure
        mean_N, total_weight = dequantise(sum_M, policy, len(survivors))
        mean = unflatten(mean_N, self._layout)
        check_shares(mean, policy.value_range)
        return Collected(survivors=survivors, mean=mean, total_weight=total_weight)

    def _add_masked(self, member: str, tensors: Mapping[str, Tensor]) -> None:
        wanted = {"masked", "sealed"} if self._rules.is_hidden else {"masked"}
        if tensors.keys() != wanted or any(x.dtype != torch.int64 for x in tensors.values()):
            raise ProtocolError(
                f"update of member {member} has tensors {sorted(tensors)[:3]}; this federation "
                f"takes {sorted(wanted)} in ring64"
            )
        sealed = bytes_of_words(tensors["sealed"]) if self._rules.is_hidden else b""
        self._secure.add_masked(member, tensors["masked"])
        # One is enough for newcomers: that of the first by name.
        if self._rules.is_hidden and member <= min(self._sealed, default=member):
            self._sealed = {member: sealed}
