"""Where a member stands in its federation: its rules, the last round, the common adapters.

It does not train. The chain of rounds is checked here: a coordinator that was restored from an
older backup, or a round that does not follow from the one before, is found out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from cutlayer.client.federation_link import FederationLink
from cutlayer.client.round_share import Adapters, RoundShare, check_mixed, round_share
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import MembershipSettings
from cutlayer.errors import ConfigError, ProtocolError, StorageError
from cutlayer.federation.chain import first_digest, next_digest, payload_digest
from cutlayer.federation.secure.hidden import GroupKey, open_state, pad
from cutlayer.federation.secure.ring import dequantise
from cutlayer.federation.settings import FederationPolicy
from cutlayer.federation.state import unflatten, update_layout
from cutlayer.federation.strategy import get_strategy
from cutlayer.model.adapters import AdapterState, initial_state
from cutlayer.wire.federation_messages import EnterRound, Join, Joined, Round
from cutlayer.wire.ring import bytes_of_words

__all__ = ["Membership", "Standing", "join", "joined_states"]

_NOTE = "federation.json"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A round that begins (or the end), and what head and tail start from."""

    begun: Round
    adapters: AdapterState


class Membership:
    """One member of one federation."""

    def __init__(
        self,
        settings: MembershipSettings,
        joined: Joined,
        state: RunState,
        group_key: GroupKey | None,
        adapters: Adapters,
    ) -> None:
        """Compare what is known of the federation with where it stands.

        Args:
            settings: what the owner accepts.
            joined: the coordinator's answer to JOIN.
            state: the run's folder.
            group_key: the members' common key, where there is one.
            adapters: of head and tail.

        Raises:
            ConfigError: the run folder belongs to another federation, or the group key is missing.
            StorageError: the coordinator stands before a round that this member knows.
        """
        self.name = joined.member
        self.policy = _policy(joined, settings.name)
        self._settings, self._state, self._group_key = settings, state, group_key
        self.adapters = adapters
        self._freezes_a = get_strategy(self.policy.strategy).freezes_a
        self._first = initial_state(adapters.layout, self.policy.adapter.seed)
        _check_policy(self.policy, settings)
        if group_key is not None and not self.policy.secure.hides_aggregate:
            raise ConfigError(
                f"federation.group_key_file is set, so this owner's sums are to be hidden, and "
                f"federation {self.policy.name} shows them to its server; ask its operator for "
                "secure.hides_aggregate=true, or remove the setting"
            )
        if self.policy.secure.hides_aggregate and group_key is None:
            raise ConfigError(
                f"federation {self.policy.name} hides its aggregate from the server; set "
                "federation.group_key_file to the members' common key"
            )
        known = state.read_note(_NOTE)
        self._round = int(known.get("round", "0"))
        self._digest = known.get("digest", "")
        self._payload = known.get("payload_digest", "")
        self.num_handed_in = int(known.get("num_handed_in", "0"))
        """Updates that have left, over all rounds and attempts."""
        self._handed_in = (
            int(known.get("handed_in_round", "0")),
            int(known.get("handed_in_attempt", "0")),
        )
        if joined.round < self._round:
            self._accept_rollback(joined)

    def enter(self, calls: FederationLink) -> Standing:
        """Wait for the next round; its adapters.

        Raises:
            ProtocolError: the round does not follow from what this member knows.
        """
        call = EnterRound(
            federation=self.policy.name,
            round=self._round,
            digest=self._digest,
            needs_state=self._round not in self._state.saved_steps(),
        )
        begun, tensors = calls.enter_round(call)
        self._check_chain(begun, tensors)
        if not begun.is_finished and len(begun.cohort) < self._settings.min_cohort:
            raise ConfigError(
                f"round {begun.round} asks {len(begun.cohort)} members, this owner demands "
                f"federation.min_cohort={self._settings.min_cohort}"
            )
        if self.policy.mixed_cuts:
            check_mixed(self.name, self.adapters, begun, tensors)
        if not self.policy.secure.hides_aggregate:
            return Standing(begun=begun, adapters=tensors)
        if begun.round == 1:
            return Standing(begun=begun, adapters=self._first)
        _check_sum(begun, tensors)
        return Standing(begun=begun, adapters=self._unsealed(begun, tensors))

    @property
    def min_cohort(self) -> int:
        """Fewer members than this hide nobody enough for this owner."""
        return self._settings.min_cohort

    @property
    def update_keys(self) -> list[str]:
        """Keys that train at this client, sorted: its update has these."""
        return list(update_layout(self.adapters.layout, self._freezes_a))

    def share_of(self, standing: Standing) -> RoundShare:
        """What this member trains and hands in, in a round that begins."""
        start = standing.adapters if self.policy.mixed_cuts else {}
        return round_share(self.adapters, standing.begun, start, self._freezes_a)

    def keep(self, begun: Round) -> None:
        """Note that the last round's result is saved."""
        self._round, self._digest = begun.round - 1, begun.digest
        self._payload = begun.payload_digest
        self._write()

    def hand_in(self, begun: Round) -> None:
        """Note, before an update leaves, that one leaves under this attempt.

        Raises:
            ProtocolError: one has left already: two under one pad would tell their difference.
        """
        attempt = (begun.round, begun.attempt)
        if attempt <= self._handed_in and self.policy.secure.hides_aggregate:
            raise ProtocolError(
                f"attempt {begun.attempt} of round {begun.round} comes again after an update was "
                "handed in under it; nothing is sent a second time, ask the operator"
            )
        self._handed_in = max(attempt, self._handed_in)
        self.num_handed_in += 1
        self._write()

    def _write(self) -> None:
        round_number, number = self._handed_in
        table = {
            "round": str(self._round),
            "digest": self._digest,
            "payload_digest": self._payload,
            "handed_in_round": str(round_number),
            "handed_in_attempt": str(number),
            "num_handed_in": str(self.num_handed_in),
        }
        self._state.write_note(_NOTE, table)

    def _check_chain(self, begun: Round, tensors: Mapping[str, Tensor]) -> None:
        done = begun.round - 1
        if done < self._round:
            raise ProtocolError(f"the coordinator begins round {begun.round} after {self._round}")
        payload = {name: x for name, x in tensors.items() if name != "sealed"}
        if payload_digest(payload) != begun.payload_digest:
            raise ProtocolError(
                f"round {begun.round}: the adapters are not those that the coordinator's digest "
                "names; nothing was trained on them, ask its operator"
            )
        if done == 0:
            self._check_first(begun, tensors)
        if not self._digest:
            return
        expected = None
        if done == self._round:
            # The same end of the chain has the same adapters before it.
            is_other = self._payload and begun.payload_digest != self._payload
            expected = "" if is_other else self._digest
        elif done == self._round + 1:
            expected = next_digest(self._digest, self.policy.name, done, begun.payload_digest)
        if expected is not None and begun.digest != expected:
            raise ProtocolError(
                f"round {done} does not follow from the one that this member knows: it was forged, "
                "or the coordinator was restored from another backup; ask its operator, and set "
                "federation.accept_rollback=true only if they can explain it"
            )

    def _check_first(self, begun: Round, tensors: Mapping[str, Tensor]) -> None:
        """Everybody can compute what the first round starts from."""
        first = {} if self.policy.secure.hides_aggregate else self._first
        if self.policy.mixed_cuts:
            shapes = {key: list(x.shape) for key, x in tensors.items()}
            first = initial_state(shapes, self.policy.adapter.seed)
        payload = payload_digest(first)
        if (payload, first_digest(self.policy.name, payload)) != (
            begun.payload_digest,
            begun.digest,
        ):
            raise ProtocolError(
                "the first round does not start from the adapters that its seed gives: it was "
                "forged, or the coordinator's software is of another version; ask its operator"
            )

    def _accept_rollback(self, joined: Joined) -> None:
        if self.policy.secure.hides_aggregate:
            raise StorageError(
                f"the coordinator of {self.policy.name} stands at round {joined.round}, this "
                f"member has seen {self._round}: under a hidden aggregate rounds must not be "
                "repeated, for two sums under one pad tell their difference. Restore the newest "
                "copy of the store, or begin a federation of another name"
            )
        if not self._settings.accept_rollback:
            raise StorageError(
                f"the coordinator of {self.policy.name} stands at round {joined.round}, this "
                f"member has seen {self._round}: it was restored from an older backup; rounds "
                "since then are lost there. Ask its operator, then set "
                "federation.accept_rollback=true to go on from its round"
            )
        self._state.forget_after(joined.round)
        self._round, self._digest, self._payload = joined.round, "", ""

    def _unsealed(self, begun: Round, tensors: Mapping[str, Tensor]) -> AdapterState:
        """Hidden aggregate: the state before the sum, and the sum without its members' pads."""
        done = begun.round - 1
        if done in self._state.saved_steps():
            return joined_states(self._state.load(done).tensors)
        before = self._state_before(tensors, done)
        assert self._group_key is not None
        policy, sum_M = self.policy, tensors["sum"].clone()
        for member in begun.survivors:
            sum_M -= pad(
                self._group_key, policy.name, done, begun.sum_attempt, member, sum_M.numel()
            )
        mean_N, _ = dequantise(sum_M, policy.secure, len(begun.survivors))
        update = update_layout(self.adapters.layout, self._freezes_a)
        mean = unflatten(mean_N.to(torch.float32), update)
        return get_strategy(policy.strategy).apply(before, mean)

    def _state_before(self, tensors: Mapping[str, Tensor], done: int) -> AdapterState:
        if done - 1 in self._state.saved_steps():
            return joined_states(self._state.load(done - 1).tensors)
        assert self._group_key is not None
        if "sealed" not in tensors:
            raise ProtocolError(f"round {done} came without the sealed state before it")
        sealed = bytes_of_words(tensors["sealed"])
        state = open_state(self._group_key, self.policy.name, done, sealed)
        shapes = {key: (x.shape, x.dtype) for key, x in state.items()}
        if shapes != {key: (x.shape, x.dtype) for key, x in self._first.items()}:
            raise ProtocolError(
                f"the sealed adapters of round {done} are not this federation's: a member sealed "
                "others; enter again after the next round"
            )
        return state


def join(
    calls: FederationLink, name: str, fingerprint: Mapping[str, str], adapters: Adapters
) -> Joined:
    """Become a member of the federation called `name`.

    Args:
        calls: to its coordinator.
        name: as the coordinator calls it.
        fingerprint: what all members must have in common.
        adapters: of head and tail.

    Raises:
        ConfigError: the coordinator has no such federation, or this member does not fit it.
        PermissionRefused: it does not admit this member.
    """
    return calls.join(Join(federation=name, fingerprint=dict(fingerprint), layout=adapters.layout))


def joined_states(states: Mapping[str, Mapping[str, Tensor]]) -> AdapterState:
    """Adapters of head and tail as one state; keys are global, so they cannot meet."""
    return {key: x for part in ("head", "tail") for key, x in states[part].items()}


def _check_policy(policy: FederationPolicy, mine: MembershipSettings) -> None:
    """Refuse rules that protect less than this owner demands.

    Raises:
        ConfigError: names the rule, and both values.
    """
    secure = policy.secure
    if secure.hides_aggregate and policy.strategy.kind == "fedadam":
        raise ConfigError(
            "fedadam keeps moments at the server, which a hidden aggregate does not show it; ask "
            "the operator for fedavg or fedprox"
        )
    if secure.enabled and secure.threshold < mine.min_threshold:
        raise ConfigError(
            f"federation {policy.name} opens secrets with secure.threshold={secure.threshold}, "
            f"this owner demands federation.min_threshold={mine.min_threshold}"
        )
    if secure.enabled and secure.neighbours is not None and secure.neighbours < mine.min_cohort - 1:
        raise ConfigError(
            f"federation {policy.name} gives a member secure.neighbours={secure.neighbours}, this "
            f"owner demands {mine.min_cohort - 1} at least (federation.min_cohort less itself)"
        )


def _check_sum(begun: Round, tensors: Mapping[str, Tensor]) -> None:
    """Without the sum the server could send members back to the first adapters unnoticed."""
    if "sum" not in tensors or tensors["sum"].dtype != torch.int64 or tensors["sum"].ndim != 1:
        raise ProtocolError(f"round {begun.round} came without the sum of the one before")


def _policy(joined: Joined, wanted: str) -> FederationPolicy:
    try:
        policy = FederationPolicy.model_validate_json(joined.policy)
    except ValidationError as error:
        raise ProtocolError(
            "the coordinator's rules are not understood; its software is of another version"
        ) from error
    if policy.name != wanted:
        # Keys, pads and the ledger are bound to the name.
        raise ProtocolError(
            f"the coordinator answered for federation {policy.name}, this owner joins {wanted}"
        )
    return policy
