"""Who may join, with what; and whether a member's past is the store's. It keeps nothing (`store`).

Every refusal goes to the member that caused it; nobody else notices.
"""

import math
import re
from collections.abc import Collection, Mapping

from cutlayer.errors import (
    ConfigError,
    PermissionRefused,
    ProtocolError,
    SpecMismatch,
    StorageError,
)
from cutlayer.federation.settings import FederationSettings, TrunkSharing
from cutlayer.federation.state import Layout, check_layout
from cutlayer.federation.store_rows import Pinned
from cutlayer.wire.federation_messages import EnterRound, Join, Publish

__all__ = ["check_begun", "check_history", "check_join", "check_metrics"]

_MAX_FIELDS = 64
_MAX_TEXT = 1000
_METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,39}")
_MAX_METRICS = 32


def check_join(
    member: str, call: Join, settings: FederationSettings, pinned: Pinned | None, trunk: Layout
) -> None:
    """Refuse who does not belong here.

    Args:
        member: the certificate's name.
        call: what it brings.
        settings: of the federation.
        pinned: what the first member brought; None if this one is the first.
        trunk: layout of the trunk's adapter.

    Raises:
        ConfigError: another federation's member.
        PermissionRefused: not listed.
        SpecMismatch: fingerprint or layout differ; every field that does is named.
        ProtocolError: malformed.
    """
    if call.federation != settings.name:
        raise ConfigError(
            f"this server runs the federation {settings.name!r}, not {call.federation[:40]!r}; "
            "correct federation.name"
        )
    if settings.members and member not in settings.members:
        raise PermissionRefused(
            f"{member} is not among the members of {settings.name}; its operator adds names to "
            "federation.members"
        )
    if settings.trunk is TrunkSharing.GROUP and settings.group_of(member) is None:
        raise PermissionRefused(
            f"{member} is in no group of {settings.name}; its operator adds names to "
            "federation.groups"
        )
    texts = [*call.fingerprint, *call.fingerprint.values()]
    if len(call.fingerprint) > _MAX_FIELDS or any(len(text) > _MAX_TEXT for text in texts):
        raise ProtocolError(f"fingerprint of {member} is larger than any member's can be")
    _check_adapter(member, call.fingerprint, settings)
    if pinned is None:
        check_layout(call.layout, trunk)
        return
    _compare(member, call.fingerprint, pinned)
    _compare_layouts(member, call.layout, pinned)


def check_history(member: str, call: EnterRound, last_round: int, digest: str | None) -> None:
    """Refuse a member that knows rounds which the store does not.

    Args:
        member: the certificate's name.
        call: the last round that it knows, and the chain's end there.
        last_round: the last one that the store has.
        digest: the chain's end at the member's round; None if the store has no such round.

    Raises:
        StorageError: the member is ahead of the store.
        ProtocolError: both know the round, but not the same one.
    """
    if call.round > last_round:
        raise _restored(member, call.round, last_round)
    if call.round < 0 or (call.digest and call.digest != digest):
        raise ProtocolError(
            f"{member} knows another round {call.round} than the coordinator: the round is forged, "
            "or the store was restored from an older backup and went on from there. Compare the "
            "digests with the other members; who is wrong forgets its rounds and joins anew"
        )


def check_begun(member: str, named: tuple[int, int], last_round: int, last_attempt: int) -> None:
    """Refuse a call of an attempt that never began here.

    Args:
        member: the certificate's name.
        named: round and attempt of the call.
        last_round: the last finished one.
        last_attempt: the newest beginning of the round after it; 0 for none.

    Raises:
        StorageError: the member knows a later round than the store.
        ProtocolError: the attempt is invented.
    """
    round_number, attempt = named
    if round_number > last_round + 1:
        raise _restored(member, round_number - 1, last_round)
    if min(named) < 1 or (round_number == last_round + 1 and attempt > last_attempt):
        raise ProtocolError(
            f"{member} sent a message of attempt {attempt} of round {round_number}, which this "
            "coordinator never began: the round is forged, or the coordinator was restored from "
            "an older backup"
        )


def check_metrics(member: str, call: Publish, last_round: int, known: Collection[str] = ()) -> None:
    """Refuse numbers that no page can show.

    Args:
        member: the certificate's name.
        call: what it publishes.
        last_round: the last finished one.
        known: names that it has published for this round before.

    Raises:
        ProtocolError: too many, malformed names, not finite, or a round that is not there.
    """
    if not 0 <= call.round <= last_round + 1:
        raise ProtocolError(f"{member} published metrics of round {call.round}, which never began")
    if len(call.metrics.keys() | set(known)) > _MAX_METRICS or not all(
        map(_METRIC.fullmatch, call.metrics)
    ):
        raise ProtocolError(
            f"{member} published more than {_MAX_METRICS} metrics, or one of a malformed name"
        )
    if not all(math.isfinite(value) for value in call.metrics.values()):
        raise ProtocolError(f"{member} published a metric that is NaN or infinite")


def _check_adapter(member: str, told: Mapping[str, str], settings: FederationSettings) -> None:
    """What is trained is the federation's to say, not the first member's."""
    wanted = settings.round_adapter().model_dump(mode="json")
    wrong = [
        f"adapter.{key}: {told[f'adapter.{key}']}, the federation has {value}"
        for key, value in wanted.items()
        if told.get(f"adapter.{key}", str(value)) != str(value)
    ]
    if wrong:
        raise SpecMismatch(
            f"{member} differs from the federation: {'; '.join(wrong)}; set the same"
        )


def _restored(member: str, known: int, last_round: int) -> StorageError:
    return StorageError(
        f"{member} knows round {known}, the coordinator's store ends at round {last_round}: it was "
        "restored from an older backup, or the member was given a forged round. Restore the newest "
        "copy; if none is left, the members ahead of it have to forget their rounds and join anew"
    )


def _compare(member: str, found: Mapping[str, str], pinned: Pinned) -> None:
    names = sorted(found.keys() | pinned.fingerprint.keys())
    wrong = [name for name in names if found.get(name) != pinned.fingerprint.get(name)]
    if wrong:
        lines = (
            f"{name}: {found.get(name, 'absent')}, the federation has "
            f"{pinned.fingerprint.get(name, 'none')}"
            for name in wrong
        )
        raise SpecMismatch(
            f"{member} differs from the federation (as {pinned.member} began it): "
            f"{'; '.join(lines)}; use the same model, cut, tokenizer and adapter"
        )


def _compare_layouts(member: str, found: Layout, pinned: Pinned) -> None:
    shapes = {key: list(shape) for key, shape in found.items()}
    wrong = sorted(
        key
        for key in shapes.keys() | pinned.layout.keys()
        if shapes.get(key) != pinned.layout.get(key)
    )
    if wrong:
        key = wrong[0]
        raise SpecMismatch(
            f"the adapter of {member} differs in {len(wrong)} tensors, such as {key}: "
            f"{shapes.get(key, 'absent')}, the federation has {pinned.layout.get(key, 'none')}; "
            "use the federation's adapter settings and cut"
        )
