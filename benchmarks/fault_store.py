"""Whether a store's tables agree with each other: rounds, attempts, members, digests.

It knows no update (`fault_rounds`).
"""

from collections.abc import Iterator, Sequence

from benchmarks.fault_evidence import StoreSeen
from cutlayer.federation.chain import first_digest, next_digest, payload_digest
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.store_rows import AttemptRow, RoundRow
from cutlayer.model.adapters import initial_state

__all__ = ["check_bookkeeping"]

_LEAST_SECURE = 3


def check_bookkeeping(rules: FederationSettings, store: StoreSeen) -> list[str]:
    """What does not fit.

    Args:
        rules: of the federation.
        store: as it was left.
    """
    wrong = [*_wrong_numbers(rules, store)]
    if not wrong:
        for row in store.rounds:
            attempts = [one for one in store.attempts if one.round == row.number]
            wrong += [f"round {row.number}: {why}" for why in _wrong_round(rules, row, attempts)]
        wrong += [*_wrong_members(store), *_wrong_chain(rules, store)]
    return wrong


def _wrong_numbers(rules: FederationSettings, store: StoreSeen) -> Iterator[str]:
    numbers = [row.number for row in store.rounds]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > rules.rounds:
        yield f"rounds {numbers} of {rules.rounds}"
    for number in {one.round for one in store.attempts}:
        found = [one.number for one in store.attempts if one.round == number]
        if found != list(range(1, len(found) + 1)):
            yield f"round {number} has attempts {found}"
        if number > len(numbers) + 1:
            yield f"round {number} was begun after {len(numbers)}"


def _wrong_round(
    rules: FederationSettings, row: RoundRow, attempts: Sequence[AttemptRow]
) -> Iterator[str]:
    finished = [one for one in attempts if one.outcome.startswith("finished")]
    if [one.number for one in finished] != [row.attempts]:
        yield f"attempts {[one.number for one in finished]} finished, {row.attempts} counts"
        return
    if row.attempts != len(attempts) or any(one.outcome == "running" for one in attempts):
        yield f"{len(attempts)} attempts, the last of which did not count, or still runs"
    if finished[0].cohort != row.cohort:
        yield "the cohort is not that of its attempt"
    if len(set(row.survivors)) != len(row.survivors):
        yield f"{row.survivors} counts a member twice"
    if sorted([*row.survivors, *row.stragglers]) != sorted(row.cohort):
        yield f"{row.survivors} and {row.stragglers} are not the cohort {row.cohort}"
    least = max(rules.quorum, _LEAST_SECURE if rules.secure.enabled else 1)
    if len(row.survivors) < least:
        yield f"{len(row.survivors)} survivors, fewer than {least}"


def _wrong_members(store: StoreSeen) -> Iterator[str]:
    known = {member.name for member in store.members}
    for row in store.rounds:
        strangers = set(row.cohort) - known
        if strangers:
            yield f"round {row.number} asks {sorted(strangers)}, who never joined"
    for member in store.members:
        counted = sum(member.name in row.survivors for row in store.rounds)
        late = sum(member.name in row.stragglers for row in store.rounds)
        if (member.num_rounds, member.num_straggled) != (counted, late):
            yield (
                f"{member.name} has {member.num_rounds} rounds and was late in "
                f"{member.num_straggled}, by the rounds it is {counted} and {late}"
            )


def _wrong_chain(rules: FederationSettings, store: StoreSeen) -> Iterator[str]:
    if store.layout is None:
        return
    is_hidden = rules.secure.hides_aggregate
    first = {} if is_hidden else initial_state(store.layout, rules.adapter.seed)
    digest = first_digest(rules.name, payload_digest(first))
    for row in store.rounds:
        digest = next_digest(digest, rules.name, row.number, row.payload_digest)
        if row.digest != digest:
            yield f"round {row.number} does not follow from the one before"
        found = store.checkpoints.get(row.number)
        if found is not None and _payload(found, store, is_hidden) != row.payload_digest:
            yield f"round {row.number} has other files than its row says"


def _payload(found: Checkpoint, store: StoreSeen, is_hidden: bool) -> str:
    if is_hidden:
        return payload_digest({} if found.hidden_sum is None else {"sum": found.hidden_sum})
    assert store.layout is not None
    return payload_digest({key: found.state[key] for key in store.layout if key in found.state})
