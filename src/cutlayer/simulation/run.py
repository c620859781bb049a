"""A federation on one machine from beginning to end: before, together, alone, and the scores.

The server and the clients are the product's own; this only arranges them. It prints nothing.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cutlayer.client.settings import ClientSettings
from cutlayer.data.tasks import ChoiceTask
from cutlayer.federation.settings import FederationSettings
from cutlayer.simulation.heldout import HeldOut, answers_of, choice_tasks, held_out
from cutlayer.simulation.owners import prepare_rows
from cutlayer.simulation.parties import Owner, Parties, num_steps, open_model, parties
from cutlayer.simulation.phases import PhaseClock
from cutlayer.simulation.results import OwnerResult, SimulationResult, Training
from cutlayer.simulation.settings import SimulationSettings
from cutlayer.simulation.timeline import Timeline, timeline_to
from cutlayer.simulation.worlds import World, process_world, thread_world

__all__ = ["run_simulation"]

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """An owner's held-out rows."""

    tasks: list[ChoiceTask]
    num_rows: int
    """It trains on."""


def run_simulation(
    settings: SimulationSettings,
    folder: Path,
    say: Say,
    trace: Path | None = None,
    cache: Path | None = None,
) -> SimulationResult:
    """Run it; no process and no thread of it is left when this returns or raises.

    Args:
        settings: of the whole federation.
        folder: a private folder for keys, rows, runs and logs.
        say: told what happens.
        trace: where a timeline of all parties goes.
        cache: of fetched assets and converted models; None is the user's.

    Raises:
        CutlayerError: whatever went wrong at any party.
    """
    clock = PhaseClock(say)
    clock.begin("preparation", "preparing model, rows and keys of every owner")
    model = open_model(settings, cache)
    rows = prepare_rows(settings, folder / "rows", cache)
    all_parties = parties(settings, model.path, rows, folder)
    with timeline_to(trace) as timeline, _world(settings, all_parties, folder, timeline, say) as w:
        owners = _compare(settings, all_parties, w, clock)
    clock.stop()
    return SimulationResult(
        rounds=all_parties.federation.rounds,
        steps=num_steps(all_parties.federation),
        strategy=all_parties.federation.strategy.kind,
        updates=_updates(all_parties.federation),
        is_in_processes=settings.simulation.processes,
        seed=settings.simulation.seed,
        owners=owners,
        seconds_by_phase=clock.seconds_by_phase,
    )


def _world(
    settings: SimulationSettings, all_parties: Parties, folder: Path, timeline: Timeline, say: Say
) -> AbstractContextManager[World]:
    if settings.simulation.processes:
        return process_world(all_parties.server, folder, timeline, say)
    return thread_world(all_parties.server, timeline, say)


def _compare(
    settings: SimulationSettings, all_parties: Parties, world: World, clock: PhaseClock
) -> list[OwnerResult]:
    """Score, train, score: every owner on its own held-out rows."""
    owners = all_parties.owners
    together = {owner.name: owner.together for owner in owners}
    alone = {owner.name: owner.alone for owner in owners if settings.simulation.alone}
    clock.begin("evaluation before", "scoring every owner's held-out rows before training")
    questions = _questions(owners, world, settings.simulation.max_heldout)
    before = _scores(together, questions, world)
    clock.begin("training together", f"training {len(owners)} owners together")
    trained_together = world.train(together, "together")
    clock.begin("evaluation together", "scoring what they learnt together")
    scored_together = _scores(together, questions, world)
    trained_alone: Mapping[str, Training] = {}
    scored_alone: Mapping[str, HeldOut] = {}
    if alone:
        clock.begin("training alone", "training every owner by itself, for as many steps")
        trained_alone = world.train(alone, "alone")
        clock.begin("evaluation alone", "scoring what each learnt by itself")
        scored_alone = _scores(alone, questions, world)
    return [
        OwnerResult(
            name=name,
            num_rows=questions[name].num_rows,
            before=before[name],
            alone=scored_alone.get(name),
            together=scored_together[name],
            trained_alone=trained_alone.get(name),
            trained_together=trained_together[name],
        )
        for name in together
    ]


def _questions(owners: list[Owner], world: World, max_heldout: int | None) -> dict[str, _Questions]:
    """Every owner's rows as questions; the answers are those of all owners' rows."""
    with_rows = {
        owner.name: owner.together.model_copy(update={"data": owner.rows.data}) for owner in owners
    }
    with world.clients(with_rows) as clients:
        datasets = {name: client.rows() for name, client in clients.items()}
    every = [row for rows in datasets.values() for row in (*rows.train, *rows.validation)]
    answers = answers_of(every)
    return {
        name: _Questions(
            tasks=choice_tasks(rows.validation[:max_heldout], answers), num_rows=len(rows.train)
        )
        for name, rows in datasets.items()
    }


def _scores(
    settings: Mapping[str, ClientSettings], questions: Mapping[str, _Questions], world: World
) -> dict[str, HeldOut]:
    def score(name: str) -> HeldOut:
        return held_out(clients[name], questions[name].tasks)

    # Two at once, so that the client's parts of one overlap with the server's of the other.
    with (
        world.clients(settings) as clients,
        ThreadPoolExecutor(2, thread_name_prefix="scores") as pool,
    ):
        return dict(zip(clients, pool.map(score, clients), strict=True))


def _updates(federation: FederationSettings) -> str:
    secure = federation.secure
    if not secure.enabled:
        return "in the open: the server sees every owner's update"
    if secure.hides_aggregate:
        return "masked, and their sum too: the server sees neither"
    return "masked: the server sees their sum, never one owner's"
