"""How a member's update reaches the federation: masked, or in the open where both sides agreed.

It does not train nor decide what may leave (`privacy.boundary`); it speaks the calls of one
attempt of a round.

Shapes: N = values of an update, M = N + 1 = values and weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cutlayer.client.federation_link import FederationLink
from cutlayer.client.round_share import RoundShare
from cutlayer.errors import ConfigError, QuorumNotMet
from cutlayer.federation.cuts import bared_block, blocks_of, fill, num_holders
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.graph import MIN_COHORT
from cutlayer.federation.secure.hidden import GroupKey, pad, seal_state
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.secure.peers import Signer, Verifier
from cutlayer.federation.settings import FederationPolicy
from cutlayer.federation.state import flatten, num_values
from cutlayer.model.cut import Cut
from cutlayer.privacy.update_gate import UpdateGate
from cutlayer.wire.federation_messages import Round, SendUpdate, UpdateTaken, round_run_id

__all__ = ["Credentials", "Handover", "Learnt"]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Who the member is and how others can be sure of it."""

    name: str
    """As the certificate says."""
    signer: Signer | None
    """None only on plaintext loopback links."""
    verifier: Verifier | None
    group_key: GroupKey | None
    """Where the aggregate is hidden from the server too."""


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a member hands in, before it is masked."""

    update: Mapping[str, Tensor] = field(repr=False)
    """Change of the weights or mean gradient, by key."""
    weight: int
    """Scored tokens behind it."""


class Handover:
    """One attempt of a round; a repeated call repeats the same content."""

    def __init__(
        self,
        calls: FederationLink,
        policy: FederationPolicy,
        begun: Round,
        credentials: Credentials,
        share: RoundShare,
        min_holders: int,
    ) -> None:
        """Make fresh secrets for the attempt, where aggregation is secure.

        Args:
            calls: to the coordinator.
            policy: of the federation.
            begun: the attempt.
            credentials: who this is.
            share: what this member hands in.
            min_holders: a block that fewer members train at their clients is not handed in.

        Raises:
            ConfigError: a block of this member is held by fewer.
        """
        self._calls, self._policy, self._begun = calls, policy, begun
        self._credentials, self._share, self._min_holders = credentials, share, min_holders
        self._member: SecureMember | None = None
        self._asked: tuple[str, ...] = ()
        self._sealed: bytes | None = None
        if policy.secure.enabled:
            attempt = Attempt(
                federation=policy.name,
                round=begun.round,
                attempt=begun.attempt,
                cohort=tuple(begun.cohort),
                policy=policy.secure,
                cuts=share.cuts,
                vector=share.vector,
            )
            self._check_holders(attempt)
            self._member = SecureMember(
                credentials.name,
                attempt,
                num_values(share.vector),
                credentials.signer,
                credentials.verifier,
            )

    @property
    def name(self) -> str:
        """Of the attempt, as the ledger and the trunk's runs know it."""
        return round_run_id(self._policy.name, self._begun.round, self._begun.attempt)

    def is_of(self, begun: Round) -> bool:
        """Whether this is that attempt's."""
        own = self._begun
        return (own.round, own.attempt, own.digest) == (begun.round, begun.attempt, begun.digest)

    def agree(self) -> None:
        """Exchange keys and shares before training, so that who drops out later can be made up."""
        if self._member is None:
            return
        keys = self._calls.share_keys(self._member.share_keys())
        secrets = self._calls.share_secrets(self._member.share_secrets(keys))
        self._member.take_secrets(secrets)
        self._check_partners(secrets.sealed)

    def send(self, learnt: Learnt, gate: UpdateGate, start: Mapping[str, Tensor]) -> None:
        """Hand the update in, and help to open the sum of all.

        Args:
            learnt: the update.
            gate: what may leave.
            start: adapters at the round's beginning; sealed for newcomers in the hidden mode.
        """
        update, weight = learnt.update, learnt.weight
        if self._member is None:
            self._calls.send_update(self._header(weight), gate.plain(update, self.name))
            return
        layout = self._share.vector
        values_N = flatten(fill(update, layout, self._share.cut), layout)
        masked_M = self._member.mask(values_N, weight, self._pad())
        released = gate.masked(masked_M, self.name, self._seal(start))
        taken = self._calls.send_update(self._header(0), released)
        self._check_survivors(taken)
        self._calls.unmask(self._member.unmask(taken))

    def _header(self, weight: int) -> SendUpdate:
        begun = self._begun
        return SendUpdate(
            federation=self._policy.name, round=begun.round, attempt=begun.attempt, weight=weight
        )

    def _seal(self, start: Mapping[str, Tensor]) -> bytes | None:
        """Once: a call that is sent again must be the same to the byte."""
        key = self._group_key()
        if key is not None and self._sealed is None:
            begun = self._begun
            self._sealed = seal_state(key, self._policy.name, begun.round, begun.digest, start)
        return self._sealed

    def _pad(self) -> Tensor | None:
        key = self._group_key()
        if key is None:
            return None
        count = num_values(self._share.vector) + 1
        begun = self._begun
        return pad(
            key, self._policy.name, begun.round, begun.attempt, self._credentials.name, count
        )

    def _group_key(self) -> GroupKey | None:
        return self._credentials.group_key if self._policy.secure.hides_aggregate else None

    def _check_holders(self, attempt: Attempt) -> None:
        """Before anything is trained: a sum over few tells much of each."""
        self._asked = attempt.graph.neighbours(self._credentials.name)
        few = self._too_few(self._asked)
        if few is not None:
            raise ConfigError(
                f"block {few[0]} is trained at {few[1]} clients that this owner can see, this one "
                f"included, and it demands federation.min_cohort={self._min_holders}: the sum "
                "would tell too much of each. Re-cut so that the server has the block, or wait "
                "until others choose such a cut, or lower federation.min_cohort"
            )

    def _check_partners(self, partners: Iterable[str]) -> None:
        """The same of those who shared secrets: nobody else's update is in the sum."""
        few = self._too_few(partners)
        if few is not None:
            raise QuorumNotMet(
                f"block {few[0]} is trained at {few[1]} clients of those who shared secrets, this "
                f"owner demands federation.min_cohort={self._min_holders}; it hands nothing in"
            )

    def _check_survivors(self, taken: UpdateTaken) -> None:
        """Of every block, the own or not: a threshold of members opens the sum without the rest."""
        least = max(self._min_holders, MIN_COHORT)
        asked, left = self._cuts_of(self._asked), self._cuts_of(taken.survivors)
        bared = bared_block(blocks_of(self._share.vector), asked, left, least)
        if bared is not None:
            raise QuorumNotMet(
                f"block {bared[0]} is in {bared[1]} of the updates that came, {least} or all that "
                "were asked are needed to hide each other; this member reveals nothing"
            )

    def _too_few(self, others: Iterable[str]) -> tuple[int, int] | None:
        """An own block that too few of these and this member hold, and how many do."""
        share = self._share
        rarest = num_holders(share.cut, blocks_of(share.update), self._cuts_of(others))
        is_enough = not share.cuts or rarest is None or rarest[1] >= self._min_holders
        return None if is_enough else rarest

    def _cuts_of(self, others: Iterable[str]) -> dict[str, Cut]:
        """Cuts of these and this member; none where all have one."""
        among = {*others, self._credentials.name}
        return {name: cut for name, cut in self._share.cuts.items() if name in among}
