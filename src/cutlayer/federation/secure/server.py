"""The server's side of secure aggregation: one object per attempt, without clock or socket.

It does not decide how long a step waits (the coordinator closes steps), and it keeps no member's
masked vector: each is added to the sum when it comes.

Source: Bonawitz et al. (CCS 2017), figure 4; Bell et al. (CCS 2020), algorithm 3.

Shapes: M = values of a masked vector, the weight included.
"""

from collections.abc import Collection, Iterable
from enum import IntEnum

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError, QuorumNotMet, StepExpired
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.graph import MIN_COHORT
from cutlayer.federation.secure.masks import add_pair_mask, add_seed_mask, is_usable
from cutlayer.federation.secure.peers import Verifier, check_signature
from cutlayer.federation.secure.recovery import Recovery
from cutlayer.federation.secure.ring import check_headroom, digest_of
from cutlayer.wire.federation_messages import (
    PeerKey,
    PeerKeys,
    PeerSecrets,
    ShareKeys,
    ShareSecrets,
    Unmask,
    UpdateTaken,
)

__all__ = ["SecureRound", "Step"]

_KEY_BYTES = 32
_MAX_SIGNED_BYTES = 8 << 10
"""Of a certificate and of a signature: neighbours get all of them in one header."""
_MAX_ENVELOPE_BYTES = 256
"""Of one neighbour's sealed shares, which are 105 bytes."""


class Step(IntEnum):
    """What members are asked for."""

    KEYS = 1
    SECRETS = 2
    UPDATES = 3
    UNMASKING = 4


_DID = {Step.KEYS: "sent keys", Step.SECRETS: "shared secrets", Step.UPDATES: "sent updates"}


class SecureRound:
    """Steps in their order: members' calls come in, `close_...` ends a step."""

    def __init__(self, attempt: Attempt, num_values: int, verifier: Verifier | None = None) -> None:
        """Wait for keys.

        Args:
            attempt: as ROUND describes it to members.
            num_values: N, values of an update; a masked vector has N + 1.
            verifier: refuses keys that neighbours would refuse, which would end their part in the
                attempt and not the liar's; None where there are no certificates.

        Raises:
            ConfigError: the policy's numbers do not fit the ring.
            QuorumNotMet: fewer than three members are in the cohort.
            ProtocolError: the cohort names somebody twice.
        """
        check_headroom(len(attempt.cohort), attempt.policy)
        self.step = Step.KEYS
        self._verifier = verifier
        self._attempt, self._graph = attempt, attempt.graph
        self._keys: dict[str, ShareKeys] = {}
        self._secrets: dict[str, ShareSecrets] = {}
        self._digests: dict[str, bytes] = {}
        self._answers: dict[str, Unmask] = {}
        self._sum_M = torch.zeros(num_values + 1, dtype=torch.int64)
        self._total_M: Tensor | None = None

    def missing(self) -> tuple[str, ...]:
        """Who may still be waited for in this step, sorted."""
        asked: Iterable[str] = {
            Step.KEYS: self._attempt.cohort,
            Step.SECRETS: self._keys,
            Step.UPDATES: self._secrets,
            Step.UNMASKING: self._digests,
        }[self.step]
        came = (self._keys, self._secrets, self._digests, self._answers)[self.step - 1]
        return tuple(sorted(set(asked) - set(came)))

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose updates are in the sum, sorted."""
        return tuple(sorted(self._digests))

    def add_keys(self, member: str, keys: ShareKeys) -> None:
        """Take a member's public keys.

        Raises:
            ProtocolError: not in the cohort, for another attempt, malformed, or changed.
            PermissionRefused: not signed by the member.
            StepExpired: too late.
        """
        self._graph.neighbours(member)
        self._check_attempt(member, keys)
        if len(keys.cipher_key) != _KEY_BYTES or len(keys.mask_key) != _KEY_BYTES:
            raise ProtocolError(f"{member} sent a public key that is not {_KEY_BYTES} bytes long")
        if not (is_usable(keys.cipher_key) and is_usable(keys.mask_key)):
            raise ProtocolError(f"{member} sent a public key that no secret can be agreed on with")
        if max(len(keys.certificate), len(keys.signature)) > _MAX_SIGNED_BYTES:
            raise ProtocolError(
                f"{member} sent a certificate or signature of over {_MAX_SIGNED_BYTES} bytes"
            )
        if self._verifier is not None:
            check_signature(_peer_key(member, keys), self._attempt, self._verifier)
        if self._is_new(member, keys, self._keys.get(member), Step.KEYS):
            self._keys[member] = keys

    def close_keys(self) -> None:
        """Go on with those whose keys came.

        Raises:
            QuorumNotMet: too few.
        """
        self._close(Step.KEYS, self._keys, self._keys)

    def peer_keys(self, member: str) -> PeerKeys:
        """The keys of a member's neighbours, once keys are closed."""
        self._check_closed(Step.KEYS, member, self._keys)
        peers = [_peer_key(name, self._keys[name]) for name in self._around(member, self._keys)]
        return PeerKeys(peers=peers, threshold=self._attempt.threshold)

    def add_secrets(self, member: str, secrets: ShareSecrets) -> None:
        """Take a member's sealed shares.

        Raises:
            ProtocolError: out of order, not one share per neighbour, or changed.
            StepExpired: too late.
        """
        self._check_attempt(member, secrets)
        self._check_closed(Step.KEYS, member, self._keys)
        if set(secrets.sealed) != set(self._around(member, self._keys)):
            raise ProtocolError(f"{member} did not send one share for each of its neighbours")
        if any(len(sealed) > _MAX_ENVELOPE_BYTES for sealed in secrets.sealed.values()):
            raise ProtocolError(f"{member} sent sealed shares of over {_MAX_ENVELOPE_BYTES} bytes")
        if self._is_new(member, secrets, self._secrets.get(member), Step.SECRETS):
            self._secrets[member] = secrets

    def close_secrets(self) -> None:
        """Go on with those whose shares came; these mask with each other.

        Raises:
            QuorumNotMet: too few.
        """
        self._close(Step.SECRETS, self._secrets, self._secrets)

    def peer_secrets(self, member: str) -> PeerSecrets:
        """The shares that neighbours sealed for a member, once secrets are closed."""
        self._check_closed(Step.SECRETS, member, self._secrets)
        around = self._around(member, self._secrets)
        return PeerSecrets(sealed={name: self._secrets[name].sealed[member] for name in around})

    def add_masked(self, member: str, vector_M: Tensor) -> None:
        """Add a member's masked update to the sum.

        Raises:
            ProtocolError: out of order, of another size or type, or changed.
            StepExpired: too late.
        """
        self._check_closed(Step.SECRETS, member, self._secrets)
        if vector_M.dtype != torch.int64 or vector_M.shape != self._sum_M.shape:
            raise ProtocolError(
                f"{member} sent a masked update of shape {list(vector_M.shape)}; "
                f"{list(self._sum_M.shape)} ring elements are wanted"
            )
        digest = digest_of(vector_M)
        if self._is_new(member, digest, self._digests.get(member), Step.UPDATES):
            self._digests[member] = digest
            self._sum_M += vector_M

    def close_updates(self) -> None:
        """Go on with those whose updates came; the others' masks have to be removed.

        Raises:
            QuorumNotMet: too few.
        """
        owners = {*self._digests, *self._dropped()}
        self._close(Step.UPDATES, self._digests, owners)

    def taken(self, member: str) -> UpdateTaken:
        """What a survivor is told about its neighbours, once updates are closed."""
        self._check_closed(Step.UPDATES, member, self._digests)
        partners = self._around(member, self._secrets)
        return UpdateTaken(
            survivors=[name for name in partners if name in self._digests],
            dropped=[name for name in partners if name not in self._digests],
            is_secure=True,
        )

    def add_unmask(self, member: str, answer: Unmask) -> None:
        """Take a survivor's shares of its neighbours' secrets.

        Raises:
            ProtocolError: out of order, other shares than asked for, or changed.
        """
        self._check_attempt(member, answer)
        asked = self.taken(member)
        if set(answer.seed_shares) != {*asked.survivors, member} or set(answer.key_shares) != set(
            asked.dropped
        ):
            raise ProtocolError(f"{member} did not reveal one share per neighbour, as it was asked")
        if self._is_new(member, answer, self._answers.get(member), Step.UNMASKING):
            self._answers[member] = answer

    def is_openable(self) -> bool:
        """Whether enough answered to open the sum, if none of them lied."""
        if self.step is not Step.UNMASKING:
            return False
        owners = {*self._digests, *self._dropped()}
        return all(self._num_left(owner, self._answers) >= self._threshold for owner in owners)

    def total(self) -> Tensor:
        """The sum of the survivors' updates, int64 [M], without masks.

        Raises:
            QuorumNotMet: too few answered.
            ProtocolError: out of order, or members sent wrong shares; more answers may help.
        """
        if self.step is not Step.UNMASKING:
            raise ProtocolError("the sum is masked until updates are closed")
        if self._total_M is None:
            self._check_left({*self._digests, *self._dropped()}, self._answers, "revealed shares")
            self._total_M = self._unmasked()
        return self._total_M

    def _unmasked(self) -> Tensor:
        attempt, recovery = self._attempt, Recovery(self._attempt, self._answers)
        total_M = self._sum_M.clone()
        for owner in self._digests:
            add_seed_mask(total_M, recovery.seed(owner), owner, attempt, -1)
        for owner in self._dropped():
            key = recovery.mask_key(owner, self._keys[owner].mask_key)
            # The masks of the dropped towards survivors are the negatives of what is left.
            for name in self._around(owner, self._digests):
                add_pair_mask(total_M, key, owner, (name, self._keys[name].mask_key), attempt)
        return total_M

    @property
    def _threshold(self) -> int:
        return self._attempt.threshold

    def _around(self, member: str, names: Collection[str]) -> list[str]:
        return [name for name in self._graph.neighbours(member) if name in names]

    def _dropped(self) -> list[str]:
        """Members whose pair masks are in survivors' updates, but whose own update is not."""
        gone = [name for name in self._secrets if name not in self._digests]
        return [name for name in gone if self._around(name, self._digests)]

    def _num_left(self, owner: str, names: Collection[str]) -> int:
        return sum(holder in names for holder in self._graph.holders(owner))

    def _close(self, step: Step, came: Collection[str], owners: Collection[str]) -> None:
        if self.step is not step:
            raise ProtocolError(f"{step.name} cannot be closed in step {self.step.name}")
        self._check_left(owners, came, _DID[step])
        self.step = Step(step + 1)

    def _check_left(self, owners: Collection[str], came: Collection[str], did: str) -> None:
        found = f"{len(came)} of {len(self._attempt.cohort)} members {did}"
        if len(came) < MIN_COHORT:
            raise QuorumNotMet(f"{found}; secure aggregation needs {MIN_COHORT}")
        for owner in sorted(owners):
            num_left = self._num_left(owner, came)
            if num_left < self._threshold:
                raise QuorumNotMet(
                    f"{found}; the secrets of {owner} need {self._threshold} of their "
                    f"{self._graph.degree + 1} holders (secure.threshold="
                    f"{self._attempt.policy.threshold:g}), {num_left} are left"
                )

    def _check_attempt(self, member: str, call: ShareKeys | ShareSecrets | Unmask) -> None:
        attempt = self._attempt
        found, own = (call.round, call.attempt), (attempt.round, attempt.attempt)
        if call.federation != attempt.federation or found != own:
            raise ProtocolError(
                f"{member} sent a message of federation {call.federation[:40]!r}, round "
                f"{call.round}, attempt {call.attempt} into {attempt.federation}, round "
                f"{attempt.round}, attempt {attempt.attempt}: a replay, or a wrong state"
            )

    def _check_closed(self, step: Step, member: str, came: Collection[str]) -> None:
        if self.step <= step:
            raise ProtocolError(f"{member} is ahead: {step.name} of this attempt is still open")
        if member not in came:
            raise StepExpired(
                f"{member} missed {step.name} of attempt {self._attempt.attempt} of round "
                f"{self._attempt.round}; wait for the next round"
            )

    def _is_new(self, member: str, given: object, known: object, step: Step) -> bool:
        """Whether to take it; the same again changes nothing."""
        if known is None and self.step is not step:
            raise StepExpired(f"{member} is late: {step.name} of this attempt is closed")
        if known is not None and given != known:
            raise ProtocolError(f"{member} sent other content in step {step.name} than before")
        return known is None


def _peer_key(name: str, keys: ShareKeys) -> PeerKey:
    return PeerKey(
        member=name,
        cipher_key=keys.cipher_key,
        mask_key=keys.mask_key,
        certificate=keys.certificate,
        signature=keys.signature,
    )
