"""The verdict on a scenario: right, refused, wrong or hung, and why.

Right: every member that finished has the same bits, the store's states are what the counted
members' own updates give, and nobody was counted twice. Refused: all who are left ended with one
of our errors, and the store holds nothing but right rounds. Anything else is wrong.

It runs nothing; states are `fault_rounds`'s, the store's tables `fault_store`'s.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.fault_evidence import Ending, Evidence, StoreSeen
from benchmarks.fault_rounds import distance, last_reference
from benchmarks.fault_store import check_bookkeeping
from cutlayer.model.adapters import AdapterState

__all__ = ["SUM_TOLERANCE", "Verdict", "judge"]

SUM_TOLERANCE = 1e-6
_CLEAR = frozenset(
    {
        "ConfigError",
        "DataError",
        "PermissionRefused",
        "ProtocolError",
        "QuorumNotMet",
        "SpecMismatch",
        "StepExpired",
        "StorageError",
        "TransportError",
    }
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a scenario."""

    kind: str
    """`right`, `refused`, `wrong` or `hung`."""
    reasons: tuple[str, ...] = ()
    """Why it is wrong; else what the refusals said."""


def judge(evidence: Evidence, tolerance: float = SUM_TOLERANCE) -> Verdict:
    """Look at everything.

    Args:
        evidence: of one scenario.
        tolerance: largest difference of a value from the reference.
    """
    endings = evidence.endings
    hung = [f"{name}: {end.message}" for name, end in endings.items() if end.outcome == "hung"]
    if hung:
        return Verdict(kind="hung", reasons=tuple(hung))
    wrong = [*_wrong_endings(evidence), *_wrong_store(evidence, tolerance)]
    if wrong:
        return Verdict(kind="wrong", reasons=tuple(wrong))
    said = tuple(
        f"{name}: {end.error}: {end.message}"
        for name, end in endings.items()
        if end.outcome == "refused"
    )
    is_any_done = any(end.outcome == "finished" for end in endings.values())
    return Verdict(kind="right" if is_any_done else "refused", reasons=said)


def _wrong_endings(evidence: Evidence) -> Iterator[str]:
    endings = evidence.endings
    is_any_done = any(end.outcome == "finished" for end in endings.values())
    for name, end in endings.items():
        is_refused = end.outcome == "refused"
        may_be = name in evidence.victims or evidence.is_rolled_back
        if end.outcome == "broke" or (is_refused and end.error not in _CLEAR):
            yield f"{name} ended with {end.error}: {end.message}"
        elif is_refused and is_any_done and not may_be:
            yield f"{name} was refused although nothing happened to it: {end.error}: {end.message}"
        elif end.outcome == "finished" and end.ends is None:
            yield f"{name} finished without a saved result"
        elif end.outcome == "finished" and not end.state_equals_saved:
            yield f"{name} holds other adapters than it saved"


def _wrong_store(evidence: Evidence, tolerance: float) -> Iterator[str]:
    if evidence.store is None:
        yield "there is no store"
        return
    finished = {n: e for n, e in evidence.endings.items() if e.outcome == "finished"}
    before = evidence.store_before
    if before is not None and len(evidence.store.rounds) < len(before.rounds):
        # Who had finished when the server went back to its backup has the lost rounds' result.
        yield from _wrong_in(evidence, before, finished, tolerance)
        finished = {}
    yield from _wrong_in(evidence, evidence.store, finished, tolerance)


def _wrong_in(
    evidence: Evidence, store: StoreSeen, finished: dict[str, Ending], tolerance: float
) -> Iterator[str]:
    wrong = check_bookkeeping(evidence.rules, store)
    if wrong:
        yield from wrong
        return
    reference, wrong = last_reference(evidence, store, tolerance)
    yield from wrong
    if not wrong:
        yield from _wrong_results(evidence, store, finished, reference, tolerance)


def _wrong_results(
    evidence: Evidence,
    store: StoreSeen,
    finished: dict[str, Ending],
    reference: AdapterState,
    tolerance: float,
) -> Iterator[str]:
    """What members ended with: the same bits, and those of the store's last round."""
    if finished and len(store.rounds) != evidence.rules.rounds:
        yield f"members finished after {len(store.rounds)} of {evidence.rules.rounds} rounds"
        return
    results = {name: end.ends for name, end in finished.items() if end.ends is not None}
    if not results:
        return
    first, wanted = next(iter(results.items()))
    for name, ends in results.items():
        if not _same_bits(ends, wanted):
            yield f"{name} and {first} ended with different adapters"
    apart = distance(wanted, reference)
    if apart > tolerance:
        yield f"{first} ended {apart:.2g} from the survivors' mean"
    stored = store.checkpoints[len(store.rounds)].state
    is_hidden = evidence.rules.secure.hides_aggregate
    if not is_hidden and not _same_bits(wanted, {key: stored[key] for key in wanted}):
        yield f"{first} ended with other adapters than the store has"


def _same_bits(ours: AdapterState, theirs: AdapterState) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[k]) for k, x in ours.items())
