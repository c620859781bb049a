"""Whether a store's rounds are the means of what their survivors sent, from the first state on.

It decides no verdict (`fault_judge`) and does no bookkeeping (`fault_store`).
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.fault_evidence import Evidence, Sent, StoreSeen
from benchmarks.fault_reference import Contribution, Reference
from cutlayer.federation.secure.hidden import pad
from cutlayer.federation.store_rows import RoundRow
from cutlayer.federation.trunk_pool import TrunkUpdate
from cutlayer.model.adapters import AdapterState, initial_state
from cutlayer.wire.federation_messages import round_run_id

__all__ = ["distance", "last_reference"]

_MAX_CHOICES = 64


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One round of the store, and what to hold it to."""

    row: RoundRow
    contributions: Sequence[Contribution]
    mean: AdapterState
    wanted: AdapterState
    """All parts after the round."""


def last_reference(
    evidence: Evidence, store: StoreSeen, tolerance: float
) -> tuple[AdapterState, list[str]]:
    """Head, trunk and tail after the last round, and what of the store is wrong.

    Args:
        evidence: what members sent, and what the trunk learnt.
        store: what came of it.
        tolerance: largest difference of a value.
    """
    if store.layout is None:
        return {}, ["rounds without a layout"] if store.rounds else []
    layout = {**store.layout, **evidence.trunk_layout}
    reference = Reference(evidence.rules, initial_state(layout, evidence.rules.adapter.seed))
    for row in store.rounds:
        complaints: list[str] = []
        for contributions in _choices(evidence, row, reference.state(), complaints):
            mean, after = reference.mean(contributions), copy.deepcopy(reference)
            after.advance(mean)
            one = _Round(row=row, contributions=contributions, mean=mean, wanted=after.state())
            found = [*_wrong_round(evidence, store, one, tolerance)]
            if not found:
                reference = after
                break
            complaints += found
        else:
            return reference.state(), complaints
    return reference.state(), []


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference of a value, over the keys of `ours`; infinite where one is missing."""
    if not ours.keys() <= theirs.keys():
        return float("inf")
    return max(
        (float((x.double() - theirs[k].double()).abs().max()) for k, x in ours.items()), default=0.0
    )


def _choices(
    evidence: Evidence, row: RoundRow, start: AdapterState, complaints: list[str]
) -> Iterator[list[Contribution]]:
    """What the counted members sent, in every way that the notes allow.

    A member that was started again, or whose server came from a backup, may have made two updates
    of one attempt; exactly one of them is in the sum.
    """
    options: list[list[Sent]] = []
    for member in row.survivors:
        sent = evidence.sent.get((member, row.number, row.attempts), [])
        if not sent:
            complaints.append(f"round {row.number} counts {member}, which sent no update")
            return
        options.append(_different(sent))
    run_id = round_run_id(evidence.rules.name, row.number, row.attempts)
    collected = evidence.trunk.get(run_id, [])
    if not collected:
        complaints.append(f"round {row.number}: the trunk's updates were never collected")
    is_gradient = evidence.rules.strategy.kind == "every_step"
    for chosen in itertools.islice(itertools.product(*options), _MAX_CHOICES):
        for brought in collected:
            yield [
                Contribution(member=m, ends=s, trunk=_trunk(brought.get(m), start, is_gradient))
                for m, s in zip(row.survivors, chosen, strict=True)
            ]


def _different(sent: Sequence[Sent]) -> list[Sent]:
    found: list[Sent] = []
    for one in sent:
        is_known = any(
            one.weight == other.weight and distance(one.update, other.update) == 0.0
            for other in found
        )
        found.extend([] if is_known else [one])
    return found


def _trunk(brought: TrunkUpdate | None, start: AdapterState, is_gradient: bool) -> Sent | None:
    if brought is None:
        return None
    if is_gradient:
        return Sent(update=brought.state, weight=brought.weight)
    changed = {key: x.double() - start[key].double() for key, x in brought.state.items()}
    return Sent(update=changed, weight=brought.weight)


def _wrong_round(
    evidence: Evidence, store: StoreSeen, one: _Round, tolerance: float
) -> Iterator[str]:
    yield from _wrong_weights(evidence, one)
    number = one.row.number
    found = store.checkpoints.get(number)
    if found is None:
        yield f"round {number} has no checkpoint"
        return
    is_hidden = evidence.rules.secure.hides_aggregate
    keys = evidence.trunk_layout.keys() if is_hidden else one.wanted.keys()
    apart = distance({key: one.wanted[key] for key in keys}, found.state)
    if apart > tolerance:
        yield f"round {number} is {apart:.2g} from the mean of its survivors"
    if is_hidden:
        yield from _wrong_hidden(evidence, one, found.hidden_sum, tolerance)


def _wrong_weights(evidence: Evidence, one: _Round) -> Iterator[str]:
    """Each survivor counts once, at its own tokens; head, trunk and tail count the same steps."""
    row, total = one.row, sum(x.ends.weight for x in one.contributions)
    if not evidence.rules.secure.hides_aggregate and row.total_weight != total:
        yield f"round {row.number} weighs {row.total_weight}, its survivors sent {total}"
    for x in one.contributions:
        is_innocent = x.member not in evidence.victims
        if x.trunk is None and is_innocent:
            yield f"round {row.number}: the trunk has nothing of {x.member}, head and tail do"
        is_delta = evidence.rules.strategy.kind != "every_step"
        if x.trunk is not None and is_delta and x.trunk.weight != x.ends.weight:
            yield (
                f"round {row.number}: {x.member} counts {x.trunk.weight} tokens in the trunk and "
                f"{x.ends.weight} in head and tail"
            )


def _wrong_hidden(
    evidence: Evidence, one: _Round, hidden_sum: Tensor | None, tolerance: float
) -> Iterator[str]:
    """Without its survivors' pads, the sum is theirs."""
    row, secure = one.row, evidence.rules.secure
    if hidden_sum is None or evidence.group_key is None:
        yield f"round {row.number} has no hidden sum"
        return
    sum_M = hidden_sum.clone()
    for x in one.contributions:
        sum_M -= pad(
            evidence.group_key, evidence.rules.name, row.number, row.attempts, x.member, len(sum_M)
        )
    total = sum(x.ends.weight for x in one.contributions)
    if int(sum_M[-1]) != total:
        yield f"round {row.number} hides the weight {int(sum_M[-1])}, its survivors sent {total}"
        return
    keys = sorted(one.contributions[0].ends.update)
    mean_N = torch.cat([one.mean[key].reshape(-1) for key in keys])
    apart = float((sum_M[:-1].double() / total * 2.0**-secure.value_bits - mean_N).abs().max())
    if apart > tolerance:
        yield f"round {row.number} hides a sum {apart:.2g} from the mean of its survivors"
