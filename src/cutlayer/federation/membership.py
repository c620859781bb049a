"""Who may join, with what; and whether a member's past is the store's. It keeps nothing (`store`).

Every refusal goes to the member that caused it; nobody else notices.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from cutlayer.errors import (
    ConfigError,
    PermissionRefused,
    ProtocolError,
    SpecMismatch,
    StorageError,
)
from cutlayer.federation.cuts import Greeting, client_part, cut_text, is_share, read_cut
from cutlayer.federation.settings import FederationSettings, TrunkSharing
from cutlayer.federation.state import Layout, check_layout
from cutlayer.federation.store_rows import Pinned
from cutlayer.model.cut import Cut
from cutlayer.wire.federation_messages import EnterRound, Join, Publish

__all__ = ["Admitted", "check_begun", "check_history", "check_join", "check_metrics"]

_MAX_FIELDS = 64
_MAX_TEXT = 1000
_METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,39}")
_MAX_METRICS = 32


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """Who may join."""

    pinned: Pinned
    """What all others must bring too, if this is the first member."""
    cut: Cut | None
    """The member's own, where cuts are mixed."""


def check_join(
    member: str,
    call: Join,
    settings: FederationSettings,
    pinned: Pinned | None,
    trunk: Layout,
    greeting: Greeting | None = None,
) -> Admitted:
    """Refuse who does not belong here.

    Args:
        member: the certificate's name.
        call: what it brings.
        settings: of the federation.
        pinned: what the first member brought; None if this one is the first.
        trunk: layout of the trunk's adapter.
        greeting: what the member's connection agreed on; needed where cuts are mixed.

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
    layout = {key: list(shape) for key, shape in sorted(call.layout.items())}
    brought, cut = Pinned(fingerprint=call.fingerprint, layout=layout, member=member), None
    if settings.mixed_cuts:
        assert greeting is not None
        cut = _own_cut(member, call, greeting)
        brought = _without_cut(brought, cut, greeting, trunk)
    if pinned is None:
        check_layout(brought.layout, trunk)
    else:
        _compare(member, brought.fingerprint, pinned)
        _compare_layouts(member, brought.layout, pinned)
    if cut is None and trunk and greeting is not None:
        _check_one_cut(member, greeting)
    return Admitted(pinned=brought, cut=cut)


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


def _check_one_cut(member: str, greeting: Greeting) -> None:
    """Rounds begin with all blocks that the server trains, so a member's runs have them all."""
    if greeting.cut != greeting.served:
        raise SpecMismatch(
            f"{member} is cut at {cut_text(greeting.cut)} and this federation trains the server's "
            f"blocks {cut_text(greeting.served)} as one; use the server's cut, or "
            "federation.mixed_cuts=true at the server"
        )


def _own_cut(member: str, call: Join, greeting: Greeting) -> Cut:
    """The member's cut, which is its connection's and within the server's blocks."""
    cut, served = read_cut(member, call.fingerprint.get("cut", "")), greeting.served
    if cut != greeting.cut:
        raise ProtocolError(
            f"{member} joins with the cut {cut_text(cut)}, its connection was greeted with "
            f"{cut_text(greeting.cut)}; use one cut for both"
        )
    if not cut.is_within(served):
        raise SpecMismatch(
            f"the cut {cut_text(cut)} of {member} reaches beyond the blocks {cut_text(served)} "
            f"that this server holds; choose {served.lower} <= lower < upper <= {served.upper}"
        )
    return cut


def _without_cut(brought: Pinned, cut: Cut, greeting: Greeting, trunk: Layout) -> Pinned:
    """What members of all cuts have in common: adapters outside the server's blocks, the model."""
    member, wanted = brought.member, client_part(trunk, cut)
    if any(is_share(key) for key in brought.layout):
        raise ProtocolError(f"{member} brings tensors of reserved names")
    found = {key: shape for key, shape in brought.layout.items() if key in trunk}
    wrong = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if wrong:
        raise SpecMismatch(
            f"the adapter of {member} differs in {len(wrong)} tensors of the server's blocks, such "
            f"as {wrong[0]}: {found.get(wrong[0], 'absent')}, by its cut {cut_text(cut)} it is "
            f"{wanted.get(wrong[0], 'at the server')}; use the federation's adapter settings"
        )
    # The digest of a client's own parts depends on its cut, that of the whole model does not.
    told = {name: text for name, text in brought.fingerprint.items() if name != "cut"}
    ends = {key: shape for key, shape in brought.layout.items() if key not in trunk}
    return replace(brought, fingerprint=told | {"weights": greeting.root}, layout=ends)


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
        hint = ", or federation.mixed_cuts=true at the server" if "cut" in wrong else ""
        raise SpecMismatch(
            f"{member} differs from the federation (as {pinned.member} began it): "
            f"{'; '.join(lines)}; use the same model, cut, tokenizer and adapter{hint}"
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
